"""What a training run carries from step to step. The teacher is not part of it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from endistill_jax.models.family import abstract_params, init_params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.sharding import opt_state_shardings, param_shardings


class TrainState(flax.struct.PyTreeNode):
    """Student and optimizer.

    Attributes:
        step: updates made so far, int32 scalar.
        params: the student's parameters, float32.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def create_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 around the given parameters."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def abstract_state(config: T5Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state's shapes and types, without computing anything."""
    return jax.eval_shape(lambda params: create_state(params, optimizer), abstract_params(config))


def state_shardings(config: T5Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where every array of the state lies."""
    params = param_shardings(config, mesh)
    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=params,
        opt_state=opt_state_shardings(optimizer, abstract_params(config), params, mesh),
    )


def init_state(
    config: T5Config, optimizer: optax.GradientTransformation, mesh: Mesh, key: jax.Array, params: Any = None
) -> TrainState:
    """A fresh state, made on its shards: no device ever holds the whole of a sharded array.

    Args:
        config: the student's settings.
        optimizer: from `make_optimizer`.
        mesh: where the state shall lie.
        key: decides the initial parameters.
        params: initial parameters to use instead.
    """
    shardings = state_shardings(config, optimizer, mesh)
    if params is not None:
        params = jax.device_put(params, shardings.params)
        return jax.jit(lambda params: create_state(params, optimizer), out_shardings=shardings)(params)
    return jax.jit(lambda key: create_state(init_params(config, key), optimizer), out_shardings=shardings)(key)
