"""Cache of prepared data between runs, and its lock."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


def cache_folder() -> pathlib.Path:
    """`$ENDISTILL_CACHE`, else `$XDG_CACHE_HOME/endistill_jax`, else `~/.cache/endistill_jax`."""
    if chosen := os.environ.get("ENDISTILL_CACHE"):
        return pathlib.Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(parent).expanduser() / "endistill_jax"


@contextlib.contextmanager
def exclusive(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Holds the lock `name` in `folder` (created if need be); other processes wait. It goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
