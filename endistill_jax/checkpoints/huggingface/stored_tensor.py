"""One tensor of a file that is open for reading."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np


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
