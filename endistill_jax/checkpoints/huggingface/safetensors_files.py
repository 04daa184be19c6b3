"""Safetensors files, one or several with an index, read and written a part of a tensor at a time.

The library that defines the format reads through a memory map, whose pages count as the process's memory, and writes
what is in memory as a whole. Here it checks headers; the numbers go through ordinary reads and writes.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from endistill_jax.checkpoints.huggingface.stored_tensor import StoredTensor
from endistill_jax.core.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_LENGTH_BYTES = 8  # of the number in front of the header: how long it is
_ALIGNMENT = 8


class Written(NamedTuple):
    """A tensor to be written.

    Attributes:
        shape: its shape.
        blocks: returns its rows in order, in blocks; called when it is written.
    """

    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]


def open_file(path: pathlib.Path) -> list[StoredTensor]:
    """The tensors of one file, from its header.

    Raises:
        UserError: if it is damaged or cut short.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # the library has compared the header with itself and with the length of the file
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from error
    header.pop("__metadata__", None)
    return [_stored(path, name, entry, _LENGTH_BYTES + length) for name, entry in header.items()]


def _stored(path: pathlib.Path, name: str, entry: Mapping, data_begin: int) -> StoredTensor:
    shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
    return StoredTensor(
        path=path,
        name=name,
        shape=shape,
        stored_as=entry["dtype"],
        dtype=dtype,
        rows=functools.partial(_read_rows, path, name, data_begin + entry["data_offsets"][0], shape, dtype),
    )


def _read_rows(
    path: pathlib.Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    row = math.prod(shape[1:]) * dtype.itemsize
    try:
        content = np.fromfile(path, np.uint8, count=(stop - start) * row, offset=offset + start * row)
        return content.view(dtype).reshape(stop - start, *shape[1:])
    except (OSError, ValueError) as error:  # the shape does not fit if the file has become shorter
        raise UserError(f"{path}: {name} cannot be read ({error})") from error


def write_files(folder: pathlib.Path, tensors: Mapping[str, Written], dtype: np.dtype, max_file_bytes: int) -> None:
    """Writes tensors in the given order, a block at a time.

    Args:
        folder: an existing folder.
        tensors: what to write, by name.
        dtype: what the numbers become.
        max_file_bytes: a new file is begun beyond this; one file gets the plain name, several an index.
    """
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in tensors.items()}
    groups: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        _write_file(folder / SINGLE, {name: tensors[name] for name in groups[0]}, dtype)
        return
    where = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, dtype)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: pathlib.Path, tensors: Mapping[str, Written], dtype: np.dtype) -> None:
    names = {known: name for name, known in _DTYPES.items()}
    # transformers refuses files that do not say which framework wrote them.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block, dtype).view(np.uint8).data)
