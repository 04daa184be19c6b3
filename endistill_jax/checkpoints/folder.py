"""A folder that appears under its name only when it is whole."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from endistill_jax.errors import UserError


@contextlib.contextmanager
def replace_folder(path: pathlib.Path, *, overwrite: bool, marker: str = "config.json") -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`; it takes the name on leaving, and is removed if anything fails.

    Args:
        path: the final name.
        overwrite: whether a folder that holds the marker may be replaced; an empty one always may.
        marker: a file by which a folder is known to be what is written here.

    Raises:
        UserError: if something else is in the way, or the disk gives out.
    """
    if path.exists() or path.is_symlink():
        if not path.is_dir():
            raise UserError(f"{path} is a file; give a folder that does not exist yet")
        replaceable = overwrite and (path / marker).is_file()
        if any(path.iterdir()) and not replaceable:
            raise UserError(f"{path} is not empty; give a folder that does not exist yet")
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        _swap(partial, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(file: pathlib.Path) -> None:
    # A rename can reach the disk before the content does: without this a power cut leaves whole names, empty files.
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _swap(partial: pathlib.Path, path: pathlib.Path) -> None:
    if not path.exists():
        os.rename(partial, path)
        return
    old = path.parent / f".{path.name}.replaced-{os.getpid()}"
    os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old)
