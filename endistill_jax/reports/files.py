"""Atomic writing of small files, and JSON that any reader accepts."""

import json
import math
import os
from typing import Any

import numpy as np

from endistill_jax.storage import stored_path


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old file or the new one and never a part.

    It is written to a file next to `path`, which then replaces it (`os.replace` locally, a rename in object stores).

    Args:
        path: the file; its folder is made when missing.
        content: what the file will hold; text is written as UTF-8.
    """
    target = stored_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def plain_values(value: Any) -> Any:
    """Turns arrays, NumPy or JAX scalars and non-finite numbers into what standard JSON can hold.

    Floats keep every bit (float32 is exact in JSON's float64). JSON has no NaN or infinity: those become the strings
    "nan", "inf" and "-inf", which `float()` reads back.
    """
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain_values(np.asarray(value).tolist())


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The standard-conforming JSON text of nested dicts and lists of numbers, strings and scalar arrays."""
    return json.dumps(plain_values(value), indent=indent, allow_nan=False, ensure_ascii=False)
