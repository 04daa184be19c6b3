"""The common interface of foreign checkpoints: one tensor at a time, under our names and in our orientation.

A reader of a format is a `Source`, which describes its model and yields its tensors one by one; a writer gets them
one by one from `tensors_of`. So memory never holds a second copy of a model, whatever the format.
"""

import abc
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from endistill_jax.checkpoints.fingerprint import combine_digests, digest_tensor, row_blocks
from endistill_jax.checkpoints.tokenizer import VocabularyFile
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, Parameter, Params, abstract_params


class Source(abc.ABC):
    """A foreign checkpoint, opened: names, shapes and types are checked, nothing large is read yet.

    Attributes:
        where: its path, for messages.
        vocabulary: the one stored with it, if any.
        pieces: without one, the fingerprint of the pieces in a tokenizer.json.
        step: optimizer steps trained, 0 if unknown.
        notes: assumptions about what the checkpoint does not specify, a sentence each.
    """

    where: str
    config: ModelConfig
    vocabulary: VocabularyFile | None = None
    pieces: str | None = None
    step: int = 0
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def read(self, parameter: Parameter) -> np.ndarray:
        """One tensor in our orientation (a transposed view will do), of the type it is stored in, finite."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every tensor of a model, from the model's own initialization; the layers of one parameter follow each other."""
    found = []
    for path, leaf in sorted(traverse_util.flatten_dict(abstract_params(config)).items()):
        if "layers" in path:
            found += [Parameter(path, layer, tuple(leaf.shape[1:])) for layer in range(leaf.shape[0])]
        else:
            found.append(Parameter(path, None, tuple(leaf.shape)))
    return tuple(found)


def assemble(source: Source, dtype: Any, shardings: Any = None) -> tuple[Params, str]:
    """Reads a whole model, one tensor at a time.

    Args:
        source: where from.
        dtype: float32 or bfloat16, what the parameters become.
        shardings: tree of `NamedSharding` like the parameters: every tensor is transferred to its devices as soon as
            it is read, and the host holds no more than one. None: NumPy arrays.

    Returns:
        The parameters, layers stacked, and the fingerprint of what was read (before it was cast).
    """
    shardings = traverse_util.flatten_dict(shardings) if shardings else {}
    params = {}
    digests = {}
    for path, group in itertools.groupby(parameters(source.config), key=lambda parameter: parameter.path):
        members = list(group)
        leaf = None
        for parameter in members:
            tensor = source.read(parameter)
            digests[parameter.name] = digest_tensor(tensor)
            leaf = _place(leaf, tensor, parameter.layer, len(members), jnp.dtype(dtype), shardings.get(path))
            del tensor  # before the next one is read
        params[path] = leaf
    return traverse_util.unflatten_dict(params), combine_digests(digests)


def tensors_of(params: Mapping[str, Any], config: ModelConfig) -> Callable[[Parameter], np.ndarray]:
    """Checks that parameters are a configuration's, and gives a function that fetches them one tensor at a time.

    The function refuses a tensor that is not finite.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    wanted = traverse_util.flatten_dict(abstract_params(config), sep="/")
    for name, leaf in wanted.items():
        if name not in leaves:
            raise UserError(f"the parameters lack {name}, which the configuration asks for")
        if leaves[name].shape != leaf.shape:
            raise UserError(f"{name} has shape {leaves[name].shape}; the configuration makes it {leaf.shape}")
    extra = sorted(leaves.keys() - wanted.keys())
    if extra:
        raise UserError(f"the configuration has no place for the parameter {extra[0]}")

    def fetch(parameter: Parameter) -> np.ndarray:
        leaf = leaves["/".join(parameter.path)]
        tensor = np.asarray(leaf if parameter.layer is None else leaf[parameter.layer])
        check_finite(tensor, f"parameter {parameter.name}")
        return tensor

    return fetch


def check_finite(tensor: np.ndarray, name: str) -> None:
    """Refuses NaN and infinity, looking at a block at a time."""
    if not all(np.isfinite(block).all() for block in row_blocks(tensor)):
        raise UserError(f"{name} holds NaN or infinity")


def _place(
    leaf: Any, tensor: np.ndarray, layer: int | None, depth: int, dtype: np.dtype, sharding: NamedSharding | None
) -> Any:
    """Puts a tensor into its parameter, which the first of its layers makes."""
    if sharding is None:
        if layer is None:
            return np.ascontiguousarray(tensor, dtype=dtype)
        leaf = np.empty((depth, *tensor.shape), dtype) if leaf is None else leaf
        leaf[layer] = tensor
        return leaf
    spec = sharding.spec if layer is None else PartitionSpec(*sharding.spec[1:])
    part = _spread(tensor, dtype, NamedSharding(sharding.mesh, spec))
    if layer is not None:
        if leaf is None:
            leaf = jax.jit(functools.partial(jnp.zeros, (depth, *tensor.shape), dtype), out_shardings=sharding)()
        part = _insert(leaf, part, layer)
    # Else the next tensor is read while this one still waits in the host's memory.
    return jax.block_until_ready(part)


def _spread(tensor: np.ndarray, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """Puts a tensor's shards on this host's devices, one after the other: the host holds no second copy of it."""
    shards = [
        jax.block_until_ready(jax.device_put(np.ascontiguousarray(tensor[index], dtype), device))
        for device, index in sharding.addressable_devices_indices_map(tensor.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, shards)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stacked: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, tensor, layer, axis=0)
