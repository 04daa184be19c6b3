"""One mesh for a laptop and a pod: axes `(data, fsdp, tensor)`, and which logical axis lies on which of them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from endistill_jax.errors import UserError
from endistill_jax.model.config import T5Config
from endistill_jax.model.t5 import boxed_init

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. Examples are spread over `data` and `fsdp`; `fsdp` also splits every kernel along the
# residual width, `tensor` along heads, MLP width and vocabulary. Activations keep the residual width whole.
LOGICAL_RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("joined_kv", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("length", None),
    ("embed_activation", None),
    ("relpos_buckets", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones); an axis of -1 takes what the others leave.

    Raises:
        UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    named = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh {named}: sizes must be positive, and at most one of them -1")
    known = int(np.prod([size for size in shape if size != -1]))
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(f"mesh {named} does not fit {len(devices)} devices; the product of its axes must equal that")
    return Mesh(mesh_utils.create_device_mesh(shape, devices=devices), MESH_AXES)


@contextlib.contextmanager
def activation_sharding(mesh: Mesh) -> Iterator[None]:
    """While tracing inside it, the model's logical constraints on activations refer to this mesh."""
    # Flax reads the abstract mesh: under `with mesh:` alone it drops every constraint without a word.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(LOGICAL_RULES):
        yield


def abstract_params(config: T5Config) -> Any:
    """Shapes and types of a model's parameters, without computing any."""
    return nn.meta.unbox(jax.eval_shape(lambda: boxed_init(config, jax.random.key(0))))


def param_shardings(config: T5Config, mesh: Mesh) -> Any:
    """A `NamedSharding` for every parameter, by its logical axes.

    Raises:
        UserError: if an axis of a parameter is not divisible by its mesh axis.
    """
    boxed = jax.eval_shape(lambda: boxed_init(config, jax.random.key(0)))
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, LOGICAL_RULES)
    jax.tree_util.tree_map_with_path(_check_divisible, nn.meta.unbox(boxed), shardings)
    return shardings


def _check_divisible(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> None:
    for size, axis in zip(leaf.shape, sharding.spec, strict=False):
        parts = 1 if axis is None else sharding.mesh.shape[axis]
        if size % parts:
            name = "/".join(entry.key for entry in path)
            raise UserError(
                f"parameter {name} has an axis of {size}, which mesh axis {axis}={parts} does not divide; "
                f"choose {axis} among the divisors of {size}"
            )


def opt_state_shardings(optimizer: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of `optimizer.init(params)`: moments lie like their parameters, everything else is replicated.

    Adafactor's row and column statistics have another shape than their parameter and are small: replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def like_param(leaf: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding if leaf.shape == param.shape else replicated

    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_utils.tree_map_params(
        optimizer, like_param, state, params, shardings, transform_non_params=lambda _: replicated
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch -> global arrays [global_batch, ...] spread over the mesh.

    Raises:
        UserError: if the examples cannot be spread evenly.
    """
    rows = len(next(iter(batch.values()))) * jax.process_count()
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(f"a batch of {rows} examples does not split over data x fsdp = {parts}; make it a multiple")
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
