"""What a training run carries from step to step. The teacher is not part of it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from endistill_jax.models.family import ModelConfig, abstract_params, init_params
from endistill_jax.objectives import Objective
from endistill_jax.sharding import logical_rules, opt_state_shardings, param_shardings


class TrainState(flax.struct.PyTreeNode):
    """Student, optimizer, and state of the objective.

    Attributes:
        step: updates made so far, int32 scalar.
        params: the student's parameters, float32.
        opt_state: the optimizer's state.
        objective: `params` of the terms by name, which are trained along with the student's; `share` of interpolated
            targets, if adaptive. Absent entries are omitted.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    objective: Mapping[str, Any] = flax.struct.field(default_factory=dict)

    @property
    def trainable(self) -> Any:
        """What the optimizer updates."""
        return trainable(self.params, self.objective)

    def saved(self) -> dict[str, Any]:
        """The tree stored in a checkpoint; without an entry for a stateless objective."""
        fields = {"step": self.step, "params": self.params, "opt_state": self.opt_state}
        return fields | ({"objective": self.objective} if self.objective else {})


def trainable(params: Any, objective: Mapping[str, Any]) -> Any:
    """The trainable tree: the student's parameters and those of the terms, if any."""
    return {"student": params, "objective": objective["params"]} if "params" in objective else params


def split_trainable(trained: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """Inverse of `trainable`: the student's parameters and the terms'; None if there are none."""
    if trained.keys() == {"student", "objective"}:
        return trained["student"], trained["objective"]
    return trained, None


def create_state(
    params: Any, optimizer: optax.GradientTransformation, objective: Mapping[str, Any] | None = None
) -> TrainState:
    """A state at step 0 from parameters and objective state."""
    objective = objective or {}
    opt_state = optimizer.init(trainable(params, objective))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, objective=objective)


def init_objective(
    objective: Objective | None, key: jax.Array, student: ModelConfig, teacher: ModelConfig | None
) -> dict[str, Any]:
    """The initial state of an objective; parameters are boxed if they have logical axes."""
    if objective is None:
        return {}
    params = objective.init_params(key, student, teacher)
    targets = objective.interpolated_targets
    share = None if targets is None else targets.init_state()
    return ({"params": params} if params else {}) | ({} if share is None else {"share": share})


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    objective: Objective | None = None,
    teacher: ModelConfig | None = None,
) -> TrainState:
    """Shapes and dtypes of the state."""
    return jax.eval_shape(
        lambda params, carried: create_state(params, optimizer, carried),
        abstract_params(config),
        nn.meta.unbox(_boxed_objective(config, objective, teacher)),
    )


def state_shardings(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    objective: Objective | None = None,
    teacher: ModelConfig | None = None,
) -> TrainState:
    """The sharding of every array of the state."""
    params = param_shardings(config, mesh)
    boxed = _boxed_objective(config, objective, teacher)
    carried = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, logical_rules())
    abstract = trainable(abstract_params(config), nn.meta.unbox(boxed))
    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=params,
        opt_state=opt_state_shardings(optimizer, abstract, trainable(params, carried), mesh),
        objective=carried,
    )


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    key: jax.Array,
    params: Any = None,
    *,
    objective: Objective | None = None,
    teacher: ModelConfig | None = None,
) -> TrainState:
    """A fresh state, initialized shard by shard: no device ever holds all of a sharded array.

    Args:
        key: for the initial parameters, including those of the terms.
        params: initial parameters to use instead.
        objective: whose state is included; None for a stateless one.
        teacher: settings of the teacher, on which terms may depend.
    """
    shardings = state_shardings(config, optimizer, mesh, objective, teacher)

    def carried(key: jax.Array) -> Any:
        return nn.meta.unbox(init_objective(objective, jax.random.fold_in(key, 1), config, teacher))

    if params is not None:
        params = jax.device_put(params, shardings.params)
        make = jax.jit(lambda params, key: create_state(params, optimizer, carried(key)), out_shardings=shardings)
        return make(params, key)
    make = jax.jit(lambda key: create_state(init_params(config, key), optimizer, carried(key)), out_shardings=shardings)
    return make(key)


def _boxed_objective(config: ModelConfig, objective: Objective | None, teacher: ModelConfig | None) -> Any:
    return jax.eval_shape(lambda: init_objective(objective, jax.random.key(0), config, teacher))
