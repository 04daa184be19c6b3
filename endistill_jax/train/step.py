"""One training step: teacher forward, student forward and backward, update. The same function for every job.

The loss of a batch is `sum over terms of coefficient * sum_of_term / weight_of_term`. The weights follow from the masks
alone, so the whole batch's weights are known before its first micro-batch runs, and gradients simply add up: neither
micro-batching nor the mesh changes what is computed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from endistill_jax.core.attention import ATTENTION_BYTES, STACKS
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Batch
from endistill_jax.models.family import ModelConfig, apply, logical_axes
from endistill_jax.objectives import LossImplementation, MeshAxes, Objective, loss_and_sums
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.sharding import activation_sharding, batch_sharding, logical_rules, param_shardings
from endistill_jax.train.state import TrainState, split_trainable, state_shardings

# Platform -> option -> value, such as {"tpu": {"xla_tpu_enable_latency_hiding_scheduler": True}}.
CompilerOptions = Mapping[str, Mapping[str, str | int | float | bool]]
PLATFORMS = ("cpu", "gpu", "tpu")
Metrics = dict[str, tuple[jax.Array, jax.Array]]


def split_micro_batches(batch: Batch, count: int) -> dict[str, jax.Array]:
    """[batch, ...] -> [count, batch / count, ...]; micro-batch i takes every count-th example from i on.

    Strided, so that every device contributes to each micro-batch and no example moves between devices.
    """
    rows = len(next(iter(batch.values())))
    if rows % count:
        raise UserError(f"a batch of {rows} examples does not split into {count} micro-batches; make it a multiple")
    return {name: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossFunction:
    """The loss of a (micro-)batch, as a function of the trainable parameters.

    Attributes:
        teacher: None if no term uses one.
        implementation: the dense one is valid anywhere.
        teacher_sharding: how the teacher's parameters are sharded, if on a mesh; see `sharding.logical_rules`.
    """

    student: ModelConfig
    teacher: ModelConfig | None
    objective: Objective
    implementation: LossImplementation = DENSE
    teacher_sharding: str = "sharded"

    def __call__(
        self,
        trained: Any,
        teacher_params: Any,
        batch: Batch,
        dropout_key: jax.Array | None = None,
        *,
        weights: Mapping[str, jax.Array],
        step: jax.Array | None = None,
        share: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and the sums that it is made of; see `objectives.loss_and_sums`.

        Args:
            trained: the student's parameters and those of the terms; differentiated.
            teacher_params: constants; None without a teacher.
            dropout_key: None disables dropout.
            weights: of the whole batch, of which this may be a micro-batch.
            step: for schedules of coefficients and interpolated targets; None uses the initial coefficients and the
                teacher's targets.
            share: state of adaptive interpolated targets.
        """
        objective, student = self.objective, self.student
        params, own = split_trainable(trained)
        teacher_out = None
        if objective.needs_teacher:
            # Without axes the mesh and its rules are another system's, such as T5X's.
            rules = logical_rules(self.teacher_sharding) if self.implementation.axes else nn.get_logical_axis_rules()
            with nn.logical_axis_rules(rules):
                reads, limit = objective.reads("teacher"), self._teacher_attention_bytes()
                teacher_out = apply(self.teacher, teacher_params, batch, reads, frozen=True, attention_bytes=limit)
        key = dropout_key if student.dropout_rate else None
        student_out = apply(student, params, batch, objective.reads("student"), dropout_key=key)
        targets = objective.interpolated_targets
        return loss_and_sums(
            objective,
            student_out,
            teacher_out,
            batch,
            weights,
            params=own,
            share=None if targets is None or step is None else targets.share(step, share),
            step=step,
            implementation=self.implementation,
        )

    def _teacher_attention_bytes(self) -> int | None:
        """As requested, or by platform; dense if nothing is known of how arrays are sharded."""
        implementation = self.implementation
        by_platform = None if implementation.axes is None else ATTENTION_BYTES[implementation.platform]
        return implementation.attention_bytes or by_platform


def accumulate(gradient: Callable[[Batch, jax.Array], Any], batch: Batch, count: int, key: jax.Array) -> Any:
    """Sums `gradient(micro_batch, key)` over the micro-batches of a batch, with a key each."""
    parts = split_micro_batches(batch, count)

    def add(total: Any, xs: tuple) -> tuple[Any, None]:
        micro_batch, index = xs
        return jax.tree.map(jnp.add, total, gradient(micro_batch, jax.random.fold_in(key, index))), None

    shapes = jax.eval_shape(gradient, {name: x[0] for name, x in parts.items()}, key)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), (parts, jnp.arange(count)))[0]


def norms_by_stack(axes: Any, gradient: Any) -> dict[str, jax.Array]:
    """Gradient norms of a model's encoder, decoder, and embedding with head.

    Args:
        axes: `logical_axes` of the model; parameters with a vocabulary axis are embedding or head.
        gradient: by the model's parameters.
    """
    groups: dict[str, list[jax.Array]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    names_of_leaves = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for (path, leaf), names in zip(leaves, names_of_leaves, strict=True):
        stack = path[0].key
        group = stack if stack in STACKS and "vocab" not in names else "embedding"
        groups.setdefault(group, []).append(leaf)
    return {group: optax.global_norm(parts) for group, parts in groups.items()}


def make_train_step(
    *,
    student: ModelConfig,
    teacher: ModelConfig | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    micro_batches: int = 1,
    base_key: jax.Array | None = None,
    implementation: LossImplementation | None = None,
    teacher_sharding: str = "sharded",
    compiler_options: CompilerOptions | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, teacher_params, batch) -> (state, metrics)`, jitted with shardings on the mesh.

    The state is donated: the one passed in must not be used again. `teacher_params` is None without a teacher.

    Args:
        teacher: None if no term of the objective uses one.
        optimizer: from `make_optimizer`.
        mesh: from `make_mesh`.
        micro_batches: number of gradient accumulation steps.
        base_key: dropout at a step uses `fold_in(base_key, step)`; needed only with dropout.
        implementation: of the losses; by default chosen by platform and shape.
        teacher_sharding: how the teacher's parameters are sharded on the mesh; see `sharding.logical_rules`.
        compiler_options: by platform, for XLA; see `options_of_platform`.

    Returns:
        The step. Its metrics are (sum, weight) pairs: every term of the objective by name, `loss`, `cross_entropy` of
        the student and `teacher_cross_entropy` where the vocabulary is read, the norms of gradient (also by stack),
        parameters and update, and the `teacher_share` of interpolated targets.
    """
    if objective.needs_teacher and teacher is None:
        raise UserError("the objective compares with a teacher, but no teacher is given")
    if base_key is None and student.dropout_rate:
        raise UserError(f"dropout_rate is {student.dropout_rate}, which needs a base_key")
    base_key = jax.random.key(0) if base_key is None else base_key
    student_axes = logical_axes(student)
    loss_function = LossFunction(
        student=student,
        teacher=teacher,
        objective=objective,
        implementation=dataclasses.replace(implementation or LossImplementation(), axes=MeshAxes(mesh=mesh)),
        teacher_sharding=teacher_sharding,
    )

    def train_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        with activation_sharding(mesh):
            weights = objective.weights(batch)
            share = state.objective.get("share")
            gradient = functools.partial(
                jax.value_and_grad(loss_function, has_aux=True),
                state.trainable,
                teacher_params,
                weights=weights,
                step=state.step,
                share=share,
            )
            key = jax.random.fold_in(base_key, state.step)
            if micro_batches == 1:
                (loss, sums), grads = gradient(batch, key)
            else:
                (loss, sums), grads = accumulate(gradient, batch, micro_batches, key)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trained = optax.apply_updates(state.trainable, updates)
            params, own = split_trainable(trained)
            carried = dict(state.objective) | ({"params": own} if own else {})
            metrics = _loss_metrics(batch, loss, sums, weights)
            metrics |= _norm_metrics(student_axes, grads, updates, trained)
            if objective.interpolated_targets is not None:
                targets = objective.interpolated_targets
                metrics["teacher_share"] = (targets.share(state.step, share), jnp.ones((), jnp.float32))
                if share is not None:
                    carried["share"] = targets.update(state.step, share, loss)
            state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, objective=carried)
            return state, metrics

    state_spec = state_shardings(student, optimizer, mesh, objective, teacher)
    teacher_spec = None
    if objective.needs_teacher:
        teacher_spec = param_shardings(teacher, mesh, teacher_sharding, "the teacher's")
    return jax.jit(
        train_step,
        in_shardings=(state_spec, teacher_spec, batch_sharding(mesh)),
        out_shardings=(state_spec, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=options_of_platform(compiler_options, mesh),
    )


def _loss_metrics(
    batch: Batch, loss: jax.Array, sums: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]
) -> Metrics:
    tokens = jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)
    return {"loss": (loss, jnp.ones(()))} | {name: (total, weights.get(name, tokens)) for name, total in sums.items()}


def _norm_metrics(axes: Any, gradient: Any, updates: Any, trained: Any) -> Metrics:
    of_student, _ = split_trainable(gradient)
    norms = {f"gradient_norm/{stack}": norm for stack, norm in norms_by_stack(axes, of_student).items()}
    norms |= {"gradient_norm": optax.global_norm(gradient), "update_norm": optax.global_norm(updates)}
    norms["parameter_norm"] = optax.global_norm(trained)
    return {name: (norm, jnp.ones(())) for name, norm in norms.items()}


def window_means(window: list[Metrics]) -> dict[str, float]:
    """Mean of every metric over some steps: summed sums over summed weights, in float64."""
    fetched = jax.device_get(window)
    means = {}
    for name in fetched[0]:
        sums, weights = np.asarray([metrics[name] for metrics in fetched], np.float64).T
        means[name] = float(sums.sum() / weights.sum()) if weights.sum() else float("nan")
    return means


def options_of_platform(options: CompilerOptions | None, mesh: Mesh) -> dict[str, str | int | float | bool] | None:
    """The options for the mesh's devices, each validated by compiling a trivial program; None if there are none."""
    options = options or {}
    for platform, chosen in options.items():
        if platform not in PLATFORMS or not isinstance(chosen, Mapping):
            raise UserError(
                f"compiler_options has {platform!r}: {chosen!r}; give options by platform ({', '.join(PLATFORMS)}), "
                "such as {'tpu': {'xla_option': value}}"
            )
    platform = LossImplementation(axes=MeshAxes(mesh=mesh)).platform
    chosen = dict(options.get(platform, {}))
    # Compile for local devices; a planned mesh may have none here.
    device = next(iter(mesh.local_devices), mesh.devices.flat[0])
    for name, value in chosen.items():
        _try_option(name, value, platform, device)
    return chosen or None


def _try_option(name: str, value: str | int | float | bool, platform: str, device: jax.Device) -> None:
    if not isinstance(value, (str, int, float, bool)):
        raise UserError(
            f"compiler_options[{platform!r}][{name!r}] is {value!r}; it must be a string, number or truth value"
        )
    number = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(number).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"compiler_options[{platform!r}][{name!r}] = {value!r} is not taken by this compiler ({reason}); "
            "correct it or leave it out"
        ) from error
