"""The arrays of a T5X checkpoint: found and described without reading them, then read one layer at a time."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from endistill_jax.checkpoints.t5x.files import ORBAX, Location, MsgpackFile, Node, key_value_store
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.storage import is_storage_failure

# Keys of the parameters: T5X's own files, Orbax's, older files of both. The optimizer's state is next to them.
_ROOTS = (("optimizer", "target"), ("target",), ("_optimizer", "target"), ("params",))
_OPTIMIZER_STATES = (("optimizer", "state"), ("state",), ("_optimizer", "state"))
_SPEC = {"driver", "kvstore", "metadata"}
_PLACEHOLDER = "PLACEHOLDER://"
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """One array as it is stored.

    Attributes:
        where: the file or folder that holds it, for messages.
        dtype: its type, bfloat16 where that was stored as bits.
        read: reads the part that NumPy's basic indexing picks.
        layered: whether reading one index of the given axis costs much less than reading everything.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[Any, ...]], np.ndarray]
    layered: Callable[[int], bool]


def open_arrays(location: Location) -> dict[str, Array]:
    """All arrays of a checkpoint's parameters by T5X's names, such as `encoder/layers_0/mlp/wo/kernel`.

    Of the optimizer's state nothing is read.
    """
    # All are being opened before the first is waited for.
    pending = dict(_orbax_arrays(location) if location.index.name == ORBAX else _native_arrays(location))
    if not pending:
        raise UserError(f"{location.index} names no parameters; T5X keeps them under optimizer/target or target")
    return {name: finish() for name, finish in pending.items()}


def _native_arrays(location: Location) -> Iterator[tuple[str, Callable[[], Array]]]:
    """T5X's own format: arrays inside the msgpack file, or descriptions there of where they are stored."""
    with location.index.open("rb") as opened:
        if opened.read(21) == b"model_checkpoint_path":
            raise UserError(f"{location.index} belongs to a TensorFlow checkpoint; T5X itself converts those")
    file = MsgpackFile(location.index, skipped=_OPTIMIZER_STATES)
    roots = [found for root in _ROOTS if (found := file.root.at(*root)) is not None and found.children]
    for name, node in _leaves(roots[0], ()) if roots else ():
        inline = file.array_type(node)
        value = None if inline is not None else file.load(node)
        if inline is not None:
            yield name, _inline_array(file, node, name, *inline)
        elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
            yield name, _store(location, name, value.removeprefix(_PLACEHOLDER))
        elif isinstance(value, dict) and value.keys() >= _SPEC:
            # Its folder, relative to the checkpoint's; at the top before TensorStore 0.1.14.
            relative = value["kvstore"].get("path") or value["path"]
            yield name, _store(location, name, relative.strip("/"), value["driver"])
        else:
            raise UserError(f"{location.index}: {name} is a {type(value).__name__}, not an array")


def _leaves(node: Node, path: tuple[str, ...]) -> Iterator[tuple[str, Node]]:
    for key, child in (node.children or {}).items():
        if child.children is None or child.is_chunked_array or child.children.keys() >= _SPEC:
            yield "/".join((*path, key)), child
        else:
            yield from _leaves(child, (*path, key))


def _orbax_arrays(location: Location) -> Iterator[tuple[str, Callable[[], Array]]]:
    """Orbax's format: a list of names, and the arrays in one database or in a folder each."""
    try:
        metadata = json.loads(location.index.read_text())
        keys = [
            tuple(str(key["key"]) for key in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")
        ]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{location.index} is damaged ({type(error).__name__}: {error}); copy it again") from error
    root = next((root for root in _ROOTS if any(key[: len(root)] == root for key in keys)), None)
    for key in keys:
        if root is not None and key[: len(root)] == root:
            name = "/".join(key[len(root) :])
            yield name, _store(location, name, ".".join(key), driver)


def _inline_array(file: MsgpackFile, node: Node, name: str, shape: tuple[int, ...], dtype: str) -> Callable[[], Array]:
    array = Array(
        where=str(file.path),
        shape=shape,
        dtype=_float_type(dtype, str(file.path), name),
        read=lambda index: np.asarray(file.load(node))[index],
        layered=lambda axis: False,
    )
    return lambda: array


def _store(location: Location, name: str, relative: str, driver: str = "zarr") -> Callable[[], Array]:
    """Starts opening a TensorStore array; the returned function waits for it."""
    in_database = (location.arrays / "manifest.ocdbt").is_file()
    where = str(location.arrays / relative)
    store = key_value_store(location.arrays / relative)
    if in_database:
        store = {"driver": "ocdbt", "base": key_value_store(location.arrays), "path": f"{relative}/"}
    opening = ts.open({"driver": driver, "kvstore": store}, open=True, read=True)

    def finish() -> Array:
        opened = _wait(opening, where, name)
        # TensorStore takes a piece that is not there for zeros. A database knows its pieces, and misses a lost one.
        if not in_database and not _wait(opened.storage_statistics(query_fully_stored=True), where, name).fully_stored:
            raise UserError(f"{where}: {name} lacks a part (or is zero there, which no weights are); copy it again")
        # T5X wrote bfloat16 as its bits until June 2021.
        stored = "bfloat16" if opened.dtype.name == "uint16" else opened.dtype.name
        dtype = _float_type(stored, where, name)
        shape = tuple(opened.shape)
        pieces = opened.chunk_layout.read_chunk.shape or shape

        def read(index: tuple[Any, ...]) -> np.ndarray:
            return np.asarray(_wait(opened[index].read(), where, name)).view(dtype)

        return Array(where=where, shape=shape, dtype=dtype, read=read, layered=lambda axis: pieces[axis] == 1)

    return finish


def _float_type(stored: str, where: str, name: str) -> np.dtype:
    if stored not in _FLOATS:
        raise UserError(f"{where}: {name} is stored as {stored}; weights are floating-point numbers")
    return np.dtype(ml_dtypes.bfloat16) if stored == "bfloat16" else np.dtype(stored)


def _wait(future: Any, where: str, name: str) -> Any:
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError, TimeoutError) as error:
        if "NOT_FOUND" in str(error):
            raise UserError(f"{where} is missing; the checkpoint says it holds {name}") from error
        # TensorStore adds its whole description of the array, in brackets.
        reason = str(error).split(" [")[0].splitlines()[0]
        kind = StorageFailure if is_storage_failure(error) else UserError
        raise kind(f"{where}: {name} cannot be read ({reason})") from error
