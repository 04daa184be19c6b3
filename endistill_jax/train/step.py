"""One training step: teacher forward, student forward and backward, update. The same function for every job.

The loss of a batch is `sum over terms of coefficient * sum_of_term / weight_of_term`. The weights follow from the masks
alone, so the whole batch's weights are known before its first micro-batch runs, and gradients simply add up: neither
micro-batching nor the mesh changes what is computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from endistill_jax.core.batch import Batch
from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.attention import platform_attention_bytes
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.t5 import T5, Output
from endistill_jax.objectives import Computation, Path, Placement, interpolate_output, loss_from_outputs, term_weights
from endistill_jax.sharding import activation_sharding, batch_sharding, logical_rules, param_shardings
from endistill_jax.train.compiler_options import CompilerOptions, options_of_platform
from endistill_jax.train.state import TrainState, state_shardings

Metrics = dict[str, tuple[jax.Array, jax.Array]]

DENSE = Computation(relations="dense", vocabulary="dense")


def forward(
    config: T5Config,
    params: Any,
    batch: Batch,
    path: Path,
    role: str,
    dropout_key: Any = None,
    computation: Computation = DENSE,
) -> Output:
    """What a path reads of its "teacher" or its "student"; without a key, without dropout.

    That is the taps and, if it reads words, the logits, or the head where the losses apply it to some tokens at a time.
    """
    if role == "teacher":
        config = dataclasses.replace(config, attention_bytes=_teacher_attention_bytes(computation))
    return T5(config).apply(
        {"params": params},
        batch,
        path.reads(role),
        deterministic=dropout_key is None,
        frozen=role == "teacher",
        rngs={} if dropout_key is None else {"dropout": dropout_key},
    )


def _teacher_attention_bytes(computation: Computation) -> int | None:
    """As asked for, or by platform; all at once where nothing is known of how arrays lie."""
    by_platform = None if computation.placement is None else platform_attention_bytes(computation.platform())
    return computation.attention_bytes or by_platform


def split_micro_batches(batch: Batch, count: int) -> dict[str, jax.Array]:
    """[batch, ...] -> [count, batch / count, ...]; micro-batch i takes every count-th example from i on.

    Strided, so that every device's examples are spread over all micro-batches and none of them moves.
    """
    rows = len(next(iter(batch.values())))
    if rows % count:
        raise UserError(f"a batch of {rows} examples does not split into {count} micro-batches; make it a multiple")
    return {name: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def loss_and_sums(
    params: Any,
    teacher_params: Any,
    batch: Batch,
    weights: dict[str, jax.Array],
    dropout_key: jax.Array | None,
    *,
    student: T5Config,
    teacher: T5Config | None,
    path: Path,
    computation: Computation = DENSE,
    teacher_placement: str = "sharded",
    step: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, or a micro-batch's share of it: what is differentiated with respect to `params`.

    Args:
        params: the student's.
        teacher_params: the teacher's, constants; None without a teacher.
        batch: the micro-batch.
        weights: `term_weights` of the whole batch.
        dropout_key: needed with dropout; None runs without it.
        student: settings of the student.
        teacher: settings of the teacher.
        path: what is compared.
        computation: in which form; the dense one is right anywhere.
        teacher_placement: how the teacher's parameters lie, where there is a mesh; see `sharding.logical_rules`.
        step: number of the step, from 0, by which interpolated targets move; None takes the teacher's own.

    Returns:
        The loss, and the sums of every term, of the student's `cross_entropy` and of the `teacher_cross_entropy` (with
        interpolated targets, of those) where words are read, without gradient of their own.
    """
    taught = None
    if path.needs_teacher:
        # Without a placement the mesh and its rules are another system's, such as T5X's.
        rules = logical_rules(teacher_placement) if computation.placement else nn.get_logical_axis_rules()
        with nn.logical_axis_rules(rules):
            taught = forward(teacher, teacher_params, batch, path, "teacher", computation=computation)
        taught = jax.lax.stop_gradient(taught)
    key = dropout_key if student.dropout_rate else None
    learned = forward(student, params, batch, path, "student", key, computation)
    if taught is not None and path.interpolated_targets is not None and step is not None:
        taught = interpolate_output(taught, learned, path.interpolated_targets.share(step), path.relation_heads)
    return loss_from_outputs(path, learned, taught, batch, weights, computation)


def _over_micro_batches(gradient: Callable[[Batch, jax.Array], Any], batch: Batch, count: int, key: jax.Array) -> Any:
    """The sum of `gradient(micro_batch, key)` over the micro-batches of a batch, one after another, with a key each."""
    if count == 1:
        return gradient(batch, key)
    parts = split_micro_batches(batch, count)

    def accumulate(total: Any, xs: tuple) -> tuple[Any, None]:
        micro_batch, index = xs
        return jax.tree.map(jnp.add, total, gradient(micro_batch, jax.random.fold_in(key, index))), None

    shapes = jax.eval_shape(gradient, {name: x[0] for name, x in parts.items()}, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(count)))[0]


def make_train_step(
    *,
    student: T5Config,
    teacher: T5Config | None,
    path: Path,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    micro_batches: int = 1,
    base_key: jax.Array | None = None,
    computation: Computation | None = None,
    teacher_placement: str = "sharded",
    compiler_options: CompilerOptions | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, teacher_params, batch) -> (state, metrics)`, jitted with shardings on the mesh.

    The state is donated: the one passed in must not be used again. `teacher_params` is None without a teacher.

    Args:
        student: settings of the model that is trained.
        teacher: settings of the frozen model, or None if the path has no term that reads one.
        path: what is compared.
        optimizer: from `make_optimizer`.
        mesh: from `make_mesh`.
        micro_batches: parts of a batch whose gradients are accumulated before the update.
        base_key: dropout at a step uses `fold_in(base_key, step)`; needed only with dropout.
        computation: in which form the losses are computed; by default chosen by platform and shape.
        teacher_placement: how the teacher's parameters lie on the mesh; see `sharding.logical_rules`.
        compiler_options: by platform, for XLA; see `options_of_platform`.

    Returns:
        The step. Its metrics are (sum, weight) pairs: every term of the path by name, `loss`, `cross_entropy` of the
        student and `teacher_cross_entropy` where logits are computed, and the norms of gradient, parameters and update.
    """
    if path.needs_teacher and teacher is None:
        raise UserError("the path compares with a teacher, but no teacher is given")
    if base_key is None and student.dropout_rate:
        raise UserError(f"dropout_rate is {student.dropout_rate}, which needs a base_key")
    base_key = jax.random.key(0) if base_key is None else base_key

    computation = dataclasses.replace(computation or Computation(), placement=Placement(mesh=mesh))
    micro_batch_loss = functools.partial(
        loss_and_sums,
        student=student,
        teacher=teacher,
        path=path,
        computation=computation,
        teacher_placement=teacher_placement,
    )

    def train_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        with activation_sharding(mesh):
            weights = term_weights(path, batch)
            gradient = jax.value_and_grad(functools.partial(micro_batch_loss, step=state.step), has_aux=True)
            key = jax.random.fold_in(base_key, state.step)

            (loss, sums), grads = _over_micro_batches(
                lambda part, key: gradient(state.params, teacher_params, part, weights, key), batch, micro_batches, key
            )
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            tokens = jnp.sum(batch["decoder_loss_weights"]).astype(jnp.float32)
            one = jnp.ones((), jnp.float32)
            metrics = {name: (value, weights.get(name, tokens)) for name, value in sums.items()}
            metrics |= {
                "loss": (loss, one),
                "gradient_norm": (optax.global_norm(grads), one),
                "update_norm": (optax.global_norm(updates), one),
                "parameter_norm": (optax.global_norm(params), one),
            }
            return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    state_spec = state_shardings(student, optimizer, mesh)
    teacher_spec = param_shardings(teacher, mesh, teacher_placement, "the teacher's") if path.needs_teacher else None
    return jax.jit(
        train_step,
        in_shardings=(state_spec, teacher_spec, batch_sharding(mesh)),
        out_shardings=(state_spec, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=options_of_platform(compiler_options, mesh),
    )
