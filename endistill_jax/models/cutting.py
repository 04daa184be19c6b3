"""Selects layers and indices of every width of a model, to initialize a smaller one.

Every parameter's axes have logical names (`embed`, `joined_kv`, `heads`, `mlp`, `vocab`, `layers`, `relpos_buckets`).
One set of indices is chosen for each name, and the small model's parameter is the large one's, taken along each axis at
the set of that axis: the same channels, heads and units everywhere.

Of n things, k evenly spaced ones are round(i * (n - 1) / (k - 1)) for i = 0 .. k - 1, halves rounded up: the first and
the last are among them. A single one is the first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def evenly_spaced(size: int, count: int) -> np.ndarray:
    """`count` of the indices 0 .. size - 1, evenly spaced: [count], rising if count is at most size."""
    gaps = max(count - 1, 1)
    return (2 * np.arange(count) * (size - 1) + gaps) // (2 * gaps)  # integers, so that halves always go up


def take(leaf: Any, axes: Sequence[str | None], indices: Mapping[str, np.ndarray]) -> Any:
    """A parameter at some indices of each axis, by the axes' logical names; a NumPy array if it is one."""
    for axis, name in enumerate(axes):
        leaf = _take(leaf, indices[name], axis)
    return leaf


def _take(leaf: Any, indices: np.ndarray, axis: int) -> Any:
    # Axes taken in full are skipped, which avoids communication between their shards.
    if np.array_equal(indices, np.arange(leaf.shape[axis])):
        return leaf
    xp = np if isinstance(leaf, np.ndarray) else jnp
    return xp.take(leaf, indices, axis, mode="clip")  # in range as they are; other modes make JAX mask
