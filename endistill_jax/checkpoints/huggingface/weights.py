"""The tensors of a folder, in safetensors or torch files: found by name, checked, and read in rows.

The library that defines safetensors reads through a memory map, whose pages count as the process's memory. Here it
checks headers; the numbers go through ordinary reads.
"""

import dataclasses
import functools
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from endistill_jax.core.errors import UserError
from endistill_jax.extras import HF, require
from endistill_jax.storage import refuse_lfs_pointer

SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
LENGTH_BYTES = 8  # of the number in front of a safetensors header: how long it is
_BLOCK = 1 << 16  # elements compared together


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that a file holds; nothing of it is in memory yet.

    Attributes:
        stored_as: what the file calls its type.
        dtype: NumPy's type for it; None if it is none of the float types that are read.
        rows: gives rows [start, stop) of its first axis, as they are stored.
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    stored_as: str
    dtype: np.dtype | None
    rows: Callable[[int, int], np.ndarray]

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is not of a float type, or not of this shape."""
        if self.dtype is None:
            raise UserError(
                f"{self.path}: {self.name} is stored as {self.stored_as}; "
                "only float32, bfloat16, float16 and float64 are read"
            )
        if self.shape != shape:
            raise UserError(f"{self.path}: {self.name} has shape {self.shape}; config.json makes it {shape}")

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both hold the same numbers; compared in blocks, so that neither is ever in memory whole."""
        return self.shape == other.shape and all(
            np.array_equal(x.astype(np.float64), y.astype(np.float64), equal_nan=True)
            for x, y in zip(self._blocks(), other._blocks(), strict=True)
        )

    def _blocks(self) -> Iterator[np.ndarray]:
        rows = max(1, _BLOCK // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            yield self.rows(start, min(start + rows, self.shape[0]))


def open_weights(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name; opens every file and reads headers only, no tensor."""
    tensors: dict[str, StoredTensor] = {}
    files, open_file = _find(folder)
    for file in files:
        refuse_lfs_pointer(file)
        for tensor in open_file(file):
            if tensor.name in tensors:
                raise UserError(f"{tensor.path} and {tensors[tensor.name].path.name} both hold {tensor.name}")
            tensors[tensor.name] = tensor
    return tensors


def _find(folder: pathlib.Path) -> tuple[list[pathlib.Path], Callable[[pathlib.Path], list[StoredTensor]]]:
    """The files that hold tensors, and what opens one."""
    # In the order of preference: safetensors needs no torch.
    openers = {"model.safetensors": open_safetensors, "pytorch_model.bin": _open_torch_file}
    for single, open_file in openers.items():
        if (folder / single).is_file():
            return [folder / single], open_file
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _read_index(index), open_file
    wanted = ", ".join(f"{single}[.index.json]" for single in openers)
    raise UserError(f"{folder} has no weights; one of {wanted} is read")


def _read_index(index: pathlib.Path) -> list[pathlib.Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({index.parent / file for file in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a valid index ({type(error).__name__}: {error})") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; {index.name} names it")
    return files


def open_safetensors(path: pathlib.Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, from its header."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # the library has compared the header with itself and with the length of the file
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from error
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"])
        offset = LENGTH_BYTES + length + entry["data_offsets"][0]
        rows = functools.partial(_read_rows, path, offset, shape, dtype)
        tensors.append(
            StoredTensor(path=path, name=name, shape=shape, stored_as=entry["dtype"], dtype=dtype, rows=rows)
        )
    return tensors


def _read_rows(
    path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    row = math.prod(shape[1:]) * dtype.itemsize
    content = np.fromfile(path, np.uint8, count=(stop - start) * row, offset=offset + start * row)
    return content.view(dtype).reshape(stop - start, *shape[1:])


def _open_torch_file(path: pathlib.Path) -> list[StoredTensor]:
    """The tensors of one `pytorch_model.bin`, read without executing arbitrary pickles.

    The file is mapped into memory and read where a tensor is asked for. Files from before torch 1.6 cannot be mapped:
    those are held in memory whole while they are open.
    """
    torch = require("torch", f"reading {path}", HF)
    try:
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch raises whatever its many parts raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged or cut short ({type(error).__name__}: {reason}); copy it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors, as pytorch_model.bin does")
    dtypes = {
        torch.float64: np.dtype(np.float64),
        torch.float32: np.dtype(np.float32),
        torch.float16: np.dtype(np.float16),
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    }
    return [
        StoredTensor(
            path=path,
            name=name,
            shape=tuple(tensor.shape),
            stored_as=str(tensor.dtype),
            dtype=dtypes.get(tensor.dtype),
            rows=functools.partial(_torch_rows, tensor.detach()),
        )
        for name, tensor in state.items()
    ]


def _torch_rows(tensor: Any, start: int, stop: int) -> np.ndarray:
    import torch

    # A copy: on CPU, JAX may alias the array, and the model would change, or crash, with the mapped file.
    part = tensor[start:stop].clone()
    if part.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return part.numpy()
