"""Atomic writing of folders."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from endistill_jax.core.errors import UserError
from endistill_jax.storage import local_path


def local_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """A folder that is to be written.

    Raises:
        UserError: if it is on a bucket.
    """
    return local_path(folder, "write to a local folder and copy it with 'gcloud storage cp -r'")


def check_free(path: pathlib.Path, *, overwrite: bool = False, marker: str = "config.json") -> None:
    """Checks that a folder may be written under this name.

    Args:
        path: the name.
        overwrite: whether a folder that holds the marker may be replaced; an empty one always may.
        marker: a file by which a folder is known to be what will be written.

    Raises:
        UserError: if the path is taken or not writable.
    """
    if path.exists() or path.is_symlink():
        if not path.is_dir():
            raise UserError(f"{path} is a file; give a folder that does not exist yet")
        replaceable = overwrite and (path / marker).is_file()
        if any(path.iterdir()) and not replaceable:
            raise UserError(f"{path} is not empty; give a folder that does not exist yet")
        if os.path.ismount(path) or path.resolve() == pathlib.Path.cwd():
            raise UserError(f"{path} is mounted, or the current folder, and cannot be renamed; give a folder inside it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be made: {parent} is not a folder that may be written to; give another place")


@contextlib.contextmanager
def replace_folder(path: pathlib.Path, *, overwrite: bool, marker: str = "config.json") -> Iterator[pathlib.Path]:
    """Yields a temporary folder next to `path`; it is renamed on success and removed on failure.

    Args:
        path: the final name.
        overwrite: as for `check_free`.
        marker: likewise.

    Raises:
        UserError: if the path is taken, or writing fails.
    """
    check_free(path, overwrite=overwrite, marker=marker)
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        partial.chmod(0o755)  # else nobody but its maker could read it
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        _swap(partial, path)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"could not write {path}: {error.strerror or error}; nothing was left there") from error
        raise


def _flush(file: pathlib.Path) -> None:
    # A rename can reach the disk before the content: without fsync a power cut leaves names of empty files.
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
