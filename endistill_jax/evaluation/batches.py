"""Batches of a few shapes from texts of many lengths, where order does not matter."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# A batch is as long as one of these parts of the longest: each is a shape, and so a compilation, of its own.
PARTS = (4, 2, 1)


class IndexedBatch(NamedTuple):
    """Some of a sequence of texts.

    Attributes:
        indices: positions in the sequence, one for each real row.
        tokens: int32 [batch_size, length], the real rows first, then rows of padding.
    """

    indices: list[int]
    tokens: np.ndarray


def batches_by_length(
    texts: Sequence[Sequence[int]], batch_size: int, max_length: int, pad_id: int = 0
) -> Iterator[IndexedBatch]:
    """Every text once, short ones with short ones: at most three shapes, `max_length` and its half and quarter.

    Args:
        texts: ids of each text, at most `max_length` of them.
        batch_size: rows of a batch; the last one of each shape is filled up.
        max_length: of the longest shape.
        pad_id: what rows are filled up with.
    """
    lengths = sorted({max(max_length // part, 1) for part in PARTS})
    of_shape: dict[int, list[int]] = {length: [] for length in lengths}
    for index, text in enumerate(texts):
        of_shape[next(length for length in lengths if len(text) <= length)].append(index)
    for length, members in of_shape.items():
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            yield IndexedBatch(indices, padded([texts[index] for index in indices], (batch_size, length), pad_id))


def padded(rows: Sequence[Sequence[int]], shape: tuple[int, int], pad_id: int = 0) -> np.ndarray:
    """Rows of ids as one int32 array of that shape, padding after their ends and for the rows that are not there."""
    array = np.full(shape, pad_id, np.int32)
    for row, ids in zip(array, rows, strict=False):
        row[: len(ids)] = ids
    return array


def without_padding(example: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    """The ids of an example's feature up to the last that is not padding."""
    ids = np.asarray(example[name])
    real = np.flatnonzero(ids)
    return tuple(ids[: real[-1] + 1].tolist()) if real.size else ()
