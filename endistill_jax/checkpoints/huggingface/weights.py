"""The tensors of a folder, whichever files hold them: found by name, checked, and read one at a time or in rows."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from endistill_jax.checkpoints.huggingface import safetensors_files, torch_files
from endistill_jax.checkpoints.huggingface.git_lfs import refuse_pointer
from endistill_jax.checkpoints.huggingface.stored_tensor import StoredTensor
from endistill_jax.checkpoints.interchange import check_finite
from endistill_jax.core.errors import UserError

_BLOCK = 1 << 16  # elements compared together


@dataclasses.dataclass(frozen=True)
class _Format:
    single: str
    index: str
    open_file: Callable[[pathlib.Path], list[StoredTensor]]


# In the order of preference: safetensors needs no torch.
_FORMATS = (
    _Format(safetensors_files.SINGLE, safetensors_files.INDEX, safetensors_files.open_file),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", torch_files.open_file),
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
