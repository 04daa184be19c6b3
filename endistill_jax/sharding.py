"""One mesh for a laptop and a pod: axes `(data, fsdp, tensor)`, and the mapping of logical axes to them."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, logical_axes

MESH_AXES = ("data", "fsdp", "tensor")

# How parameters are sharded: by all rules, or replicated except along axes that shard activations too.
PARAM_SHARDINGS = ("sharded", "replicated")

# Logical axis -> mesh axis. Examples are sharded over `data` and `fsdp`; `fsdp` also shards every kernel along the
# residual width, `tensor` along heads, MLP width and vocabulary. The residual width of activations is not sharded.
LOGICAL_RULES = (
    ("batch", ("data", "fsdp")),
    ("lookup_batch", "data"),  # of embedding lookups, before they are gathered along the width
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


def logical_rules(sharding: str = "sharded") -> tuple[tuple[str, Any], ...]:
    """Logical axis -> mesh axis, for `flax.linen.logical_axis_rules`.

    A "replicated" model is not sharded along the residual width, so nothing is gathered over `fsdp`. Along heads, MLP
    width and vocabulary it stays sharded over `tensor`, like its activations.
    """
    if sharding not in PARAM_SHARDINGS:
        raise UserError(f"the sharding of parameters is {sharding!r}; choose one of {', '.join(PARAM_SHARDINGS)}")
    if sharding == "sharded":
        return LOGICAL_RULES
    changed = {"embed": None, "lookup_batch": ("data", "fsdp")}
    return tuple((name, changed.get(name, axis)) for name, axis in LOGICAL_RULES)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slices: int | None = None,
) -> Mesh:
    """A mesh over all devices (or the given ones); an axis of -1 is inferred from the others.

    Only `data` spans slices, so the slow network between them carries one gradient all-reduce per step.

    Args:
        data: data parallelism with replicated parameters.
        fsdp: data parallelism with sharded parameters.
        tensor: shards of heads, MLP width and vocabulary.
        devices: by default all.
        slices: groups of devices with a slow network between them; processes, for devices that report no slices. None
            detects TPU slices and treats other devices as one.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    named = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh {named}: sizes must be positive, and at most one of them -1")
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh {named} does not fit {len(devices)} devices; the product of its axes must equal that")
    return Mesh(_arrange(shape, devices, slices), MESH_AXES)


def _arrange(shape: list[int], devices: Sequence[jax.Device], slices: int | None) -> np.ndarray:
    """Devices [data, fsdp, tensor], neighbors in the fast network next to each other, slices along `data`."""
    detected = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    if slices is None:
        slices = detected if devices[0].platform == "tpu" else 1
    elif slices not in ({detected} if detected > 1 else {1, processes}):
        raise UserError(
            f"slices is {slices}, but the {len(devices)} devices form {detected} slice(s) in {processes} process(es); "
            f"choose {detected if detected > 1 else processes}, or leave it None"
        )
    data, *others = shape
    if data % slices:
        # Else parameters would be gathered over the slow network between slices.
        raise UserError(f"mesh axis data={data} does not split over {slices} slices; make it a multiple of {slices}")
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [data // slices, *others],
        [slices, 1, 1],
        devices=devices,
        process_is_granule=detected == 1,
        allow_split_physical_axes=True,
    )


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, sharding: str = "sharded") -> Iterator[None]:
    """Context for tracing in which a model's logical sharding constraints refer to this mesh."""
    # Flax reads the abstract mesh: under `with mesh:` alone it silently drops every constraint.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(logical_rules(sharding)):
        yield


def param_shardings(config: ModelConfig, mesh: Mesh, sharding: str = "sharded", whose: str = "the model's") -> Any:
    """A `NamedSharding` for every parameter, by its logical axes and `logical_rules`; `whose` is for messages."""
    rules = logical_rules(sharding)
    _check_divisible(config, mesh, dict(rules), whose)

    def whole_vectors(names: PartitionSpec) -> PartitionSpec:
        # Vectors (normalization scales) are cheaper to replicate than to gather.
        return PartitionSpec() if len([name for name in names if name != "layers"]) == 1 else names

    names = jax.tree.map(whole_vectors, logical_axes(config), is_leaf=lambda x: isinstance(x, PartitionSpec))
    return nn.logical_to_mesh_sharding(names, mesh, rules)


def _check_divisible(config: ModelConfig, mesh: Mesh, rules: Mapping[str, Any], whose: str) -> None:
    widths = config.family.widths
    for logical, name in widths.items():
        axis, size = rules[logical], getattr(config, name)
        if axis is None or size % mesh.shape[axis] == 0:
            continue
        together = [other for key, other in widths.items() if rules[key] == axis]
        common = math.gcd(*(getattr(config, other) for other in together))
        valid = [str(parts) for parts in range(1, mesh.size + 1) if common % parts == 0 and mesh.size % parts == 0]
        raise UserError(
            f"mesh axis {axis}={mesh.shape[axis]} does not divide {whose} {name} of {size}; "
            f"on {mesh.size} devices {axis} may be {', '.join(valid)} (to divide {', '.join(together)})"
        )


def opt_state_shardings(optimizer: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of `optimizer.init(params)`: moments are sharded like their parameters, everything else is replicated.

    Adafactor's row and column statistics differ in shape from their parameter and are small, so they are replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def like_param(leaf: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding if leaf.shape == param.shape else replicated

    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_utils.tree_map_params(
        optimizer, like_param, state, params, shardings, transform_non_params=lambda _: replicated
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shards examples over `data` and `fsdp`, and no other axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


class HostPart(NamedTuple):
    """Which of `count` equal parts of every batch a host loads; several do if the axis `tensor` spans them.

    `leads` is whether this host is the first with this part.
    """

    index: int
    count: int
    leads: bool


@functools.lru_cache
def host_part(mesh: Mesh) -> HostPart:
    """This host's part of the rows of a batch on a mesh."""
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    for device, (row,) in batch_sharding(mesh).devices_indices_map((spread,)).items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    # Hosts must have all or none of their rows in common.
    if sum(map(len, parts)) != spread or len({len(part) for part in parts}) != 1:
        raise UserError(
            f"mesh {dict(mesh.shape)} splits the rows of a batch unevenly over {len(rows)} hosts; "
            "make tensor a divisor, or a multiple, of the devices of a host"
        )
    mine = rows[jax.process_index()]
    first = min(process for process, held in rows.items() if held == mine)
    return HostPart(parts.index(tuple(sorted(mine))), len(parts), first == jax.process_index())


def host_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """This host's rows of a global batch, for `place_batch`."""
    part = host_part(mesh)
    rows = len(next(iter(batch.values()))) // part.count
    return {name: array[part.index * rows :][:rows] for name, array in batch.items()}


def check_rows(setting: str, rows: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Checks that a batch of so many rows, and each of its micro-batches, divides evenly over a mesh.

    `setting` is where the batch size comes from, for the message, which gives valid values.
    """
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = spread * micro_batches
    if rows % parts:
        fitting = [str(number) for number in (rows // parts * parts, -(-rows // parts) * parts) if number]
        raise UserError(
            f"{setting} is {rows}; it must be a multiple of {parts} (mesh axes data x fsdp = {spread}"
            + (f", times Run.micro_batches = {micro_batches}" if micro_batches > 1 else "")
            + f"): choose {' or '.join(fitting)}"
        )


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch -> global arrays [global_batch, ...] spread over the mesh."""
    rows = len(next(iter(batch.values()))) * host_part(mesh).count
    check_rows("the number of examples of a batch", rows, mesh)
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:]))
        for name, array in batch.items()
    }
