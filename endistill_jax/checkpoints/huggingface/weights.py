"""The tensors of a folder, in safetensors or torch files: found by name, checked, and read one at a time or in rows."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from endistill_jax.checkpoints.interchange import check_finite
from endistill_jax.core.errors import UserError
from endistill_jax.storage import refuse_pointer


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that a file holds; nothing of it is in memory yet.

    Attributes:
        path: the file.
        name: its name there.
        shape: its shape there.
        stored_as: what the file calls its type.
        dtype: NumPy's type for it; None if it is none of the float types that are read.
        rows: gives rows [start, stop) of its first axis.
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    stored_as: str
    dtype: np.dtype | None
    rows: Callable[[int, int], np.ndarray]


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
LENGTH_BYTES = 8  # of the number in front of the header: how long it is


def open_safetensors(path: pathlib.Path) -> list[StoredTensor]:
    """The tensors of one file, from its header.

    Raises:
        UserError: if it is damaged or cut short.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # the library has compared the header with itself and with the length of the file
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from error
    header.pop("__metadata__", None)
    return [_safetensor(path, name, entry, LENGTH_BYTES + length) for name, entry in header.items()]


def _safetensor(path: pathlib.Path, name: str, entry: Mapping, data_begin: int) -> StoredTensor:
    shape, dtype = tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"])
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


_TORCH_DTYPES = {
    "torch.float64": np.dtype(np.float64),
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def open_torch_file(path: pathlib.Path) -> list[StoredTensor]:
    """The tensors of one `pytorch_model.bin`.

    The file is mapped into memory and read where a tensor is asked for. Files from before torch 1.6 cannot be mapped:
    those are held in memory whole while they are open.

    Raises:
        UserError: if torch is not installed, the file is damaged, or it holds something else than tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs torch; pip install 'endistill-jax[hf]', or save the model as safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch raises whatever its many parts raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged or cut short ({type(error).__name__}: {reason}); copy it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors, as pytorch_model.bin does")
    return [_torch_tensor(path, name, tensor.detach()) for name, tensor in state.items()]


def _torch_tensor(path: pathlib.Path, name: str, tensor: Any) -> StoredTensor:
    return StoredTensor(
        path=path,
        name=name,
        shape=tuple(tensor.shape),
        stored_as=str(tensor.dtype),
        dtype=_TORCH_DTYPES.get(str(tensor.dtype)),
        rows=functools.partial(_torch_rows, tensor),
    )


def _torch_rows(tensor: Any, start: int, stop: int) -> np.ndarray:
    import torch

    # A copy: on CPU, JAX may alias the array, and the model would change, or crash, with the mapped file.
    part = tensor[start:stop].clone()
    if part.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return part.numpy()


_BLOCK = 1 << 16  # elements compared together


@dataclasses.dataclass(frozen=True)
class _Format:
    single: str
    index: str
    open_file: Callable[[pathlib.Path], list[StoredTensor]]


# In the order of preference: safetensors needs no torch.
_FORMATS = (
    _Format(SINGLE, INDEX, open_safetensors),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", open_torch_file),
)


class Weights:
    """Tensors by name; opening reads headers only, no tensor."""

    def __init__(self, folder: pathlib.Path):
        """Opens every file.

        Raises:
            UserError: if there are none, one that an index names is missing or lacks a tensor, or one is damaged.
        """
        self._tensors: dict[str, StoredTensor] = {}
        files, promised, open_file = _find(folder)
        for file in files:
            refuse_pointer(file)
        for tensor in itertools.chain.from_iterable(map(open_file, files)):
            if tensor.name in self._tensors:
                raise UserError(f"{tensor.path} and {self._tensors[tensor.name].path.name} both hold {tensor.name}")
            self._tensors[tensor.name] = tensor
        for name, path in promised.items():
            if name not in self._tensors or self._tensors[name].path != path:
                raise UserError(f"{path} lacks the tensor {name}, which the index beside it says it holds")

    def close(self) -> None:
        """Closes the files."""
        self._tensors = {}

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._tensors)

    def path(self, name: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self._tensors[name].path

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Looks at a tensor's header.

        Raises:
            UserError: if it is not of a float type, or not of this shape.
        """
        tensor = self._tensors[name]
        if tensor.dtype is None:
            raise UserError(
                f"{tensor.path}: {name} is stored as {tensor.stored_as}; "
                "only float32, bfloat16, float16 and float64 are read"
            )
        if tensor.shape != shape:
            raise UserError(f"{tensor.path}: {name} has shape {tensor.shape}; config.json makes it {shape}")

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored.

        Raises:
            UserError: if it holds NaN or infinity, or its file is no longer what it was.
        """
        tensor = self._tensors[name]
        array = tensor.rows(0, tensor.shape[0])
        check_finite(array, f"{tensor.path}: {name}")
        return array

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers; compared in blocks, so that neither is ever in memory whole."""
        a, b = self._tensors[first], self._tensors[second]
        return a.shape == b.shape and all(
            np.array_equal(x.astype(np.float64), y.astype(np.float64), equal_nan=True)
            for x, y in zip(_blocks(a), _blocks(b), strict=True)
        )


def _blocks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK // max(1, int(np.prod(tensor.shape[1:]))))
    for start in range(0, tensor.shape[0], rows):
        yield tensor.rows(start, min(start + rows, tensor.shape[0]))


def _find(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, pathlib.Path], Callable]:
    """The files to open, which tensors an index promises in which of them, and what opens one."""
    for kind in _FORMATS:
        if (folder / kind.single).is_file():
            return [folder / kind.single], {}, kind.open_file
        if (folder / kind.index).is_file():
            promised = _read_index(folder / kind.index)
            return sorted(set(promised.values())), promised, kind.open_file
    wanted = ", ".join(name for kind in _FORMATS for name in (kind.single, kind.index))
    raise UserError(f"{folder} has no weights; one of {wanted} is read")


def _read_index(index: pathlib.Path) -> dict[str, pathlib.Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        promised = {name: index.parent / file for name, file in sorted(weight_map.items())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a valid index ({type(error).__name__}: {error})") from error
    for name, path in promised.items():
        if not path.is_file():
            raise UserError(f"{path} is missing; {index.name} says it holds {name}")
    return promised
