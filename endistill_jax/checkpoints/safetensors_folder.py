"""Tensors of a folder of safetensors files, one file or several with an index, read and written a few at a time."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import safetensors
import safetensors.numpy

from endistill_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")


class TensorReader(contextlib.AbstractContextManager):
    """Reads tensors by name; opening it reads headers only."""

    def __init__(self, folder: pathlib.Path):
        """Opens every file.

        Raises:
            UserError: if there are none, one that the index names is missing, or one is damaged.
        """
        self._stack = contextlib.ExitStack()
        self._files: dict[str, tuple[pathlib.Path, safetensors.safe_open]] = {}
        try:
            for path in _files(folder):
                file = self._open(path)
                self._files.update({name: (path, file) for name in file.keys()})  # noqa: SIM118 - not a dict
        except BaseException:
            self._stack.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._files)

    def path(self, name: str) -> pathlib.Path:
        """The file that holds a tensor."""
        return self._files[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored.

        Raises:
            UserError: if it is not of a float type, or holds NaN or infinity.
        """
        path, file = self._files[name]
        stored = file.get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise UserError(f"{path}: {name} is stored as {stored}; only {', '.join(_FLOATS)} are read")
        array = file.get_tensor(name)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
        return array

    def _open(self, path: pathlib.Path) -> safetensors.safe_open:
        try:
            return self._stack.enter_context(safetensors.safe_open(path, framework="np"))
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from error


def write_tensors(
    folder: pathlib.Path, sizes: Mapping[str, int], make: Callable[[str], np.ndarray], max_file_bytes: int
) -> None:
    """Writes tensors in the given order, holding one file's worth of them at a time.

    Args:
        folder: an existing folder.
        sizes: names and bytes of the tensors.
        make: gives a tensor by name, when it is its turn.
        max_file_bytes: a new file is begun beyond this; one file gets the plain name, several an index.
    """
    groups: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        _write_file(folder / SINGLE, groups[0], make)
        return
    where = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / file, names, make)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: pathlib.Path, names: list[str], make: Callable[[str], np.ndarray]) -> None:
    # transformers refuses files that do not say which framework wrote them.
    safetensors.numpy.save_file({name: make(name) for name in names}, path, metadata={"format": "pt"})


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        hint = "; pytorch_model.bin is not read, save it as safetensors" if any(folder.glob("pytorch_model*")) else ""
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a valid index ({type(error).__name__}: {error})") from error
    for name in names:
        if not (folder / name).is_file():
            tensor = min(key for key, value in weight_map.items() if value == name)
            raise UserError(f"{folder / name} is missing; {index.name} says it holds {tensor}")
    return [folder / name for name in names]
