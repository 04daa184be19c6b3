"""Local folders, written atomically, and Google Cloud Storage (`gs://bucket/folder`)."""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from endistill_jax.core.errors import StorageFailure, UserError

BUCKET = "gs://"
# Error names that RPC systems, TensorFlow and Google's clients use for unreachable or overloaded storage; a damaged
# or missing file has none of them.
_PASSING = re.compile(
    r"unavailable|deadline_?exceeded|resource_?exhausted|aborted(error)?$|internal(error|servererror)?$|cancelled"
    r"|too_?many_?requests|gateway_?timeout|bad_?gateway|retryerror|connectionerror|timeouterror|transporterror",
    re.IGNORECASE,
)
# Prefix of TensorStore's ValueError messages.
_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|INTERNAL|CANCELLED)\b")
_DAMAGE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a scheme, such as `gs://bucket/folder`."""
    return "://" in os.fspath(path)


def stored_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path as it is opened: absolute if local, unchanged if in a bucket.

    Raises:
        UserError: unsupported storage.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(text).expanduser().resolve()
    if not text.startswith(BUCKET) or not text.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{text} is not a place for files; give a local path, or {BUCKET}BUCKET/FOLDER")
    return epath.Path(text)  # `resolve` would turn it into a local folder called "gs:"


def local_path(path: str | os.PathLike[str], advice: str) -> pathlib.Path:
    """A local path.

    Args:
        path: as given by the user.
        advice: what to do instead if it is remote.

    Raises:
        UserError: it is in a bucket; pathlib would turn it into a local folder called "gs:".
    """
    if is_remote(path):
        raise UserError(f"{path} is not local; {advice}")
    return pathlib.Path(path).expanduser()


def check_folder(path: str | os.PathLike[str]) -> None:
    """Checks, as far as possible without writing, that a folder exists or can be created, and is writable.

    Raises:
        UserError: unsupported storage, a file where the folder should be, or missing write permission.
    """
    place = stored_path(path)
    if is_remote(path):
        return
    there = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
    if not os.path.isdir(there):
        raise UserError(f"{path} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: you have no right to write to {there}")


def check_writable_place(path: str | os.PathLike[str]) -> None:
    """`check_folder` for checkpoints; also checks that Orbax can write to buckets.

    Raises:
        UserError: as `check_folder`, or naming what to install.
    """
    check_folder(path)
    if is_remote(path) and not _is_installed("google.cloud.storage"):
        raise UserError(
            f"checkpoints in {path} need google-cloud-storage, which is not installed; "
            "install the extra `gcs`: pip install 'endistill-jax[gcs]'"
        )


def reading_failure(what: str, error: Exception) -> UserError | StorageFailure:
    """The one-line error to raise for an exception during reading.

    Args:
        what: failed, such as "checkpoint /runs/x cannot be restored".
        error: the exception.

    Returns:
        `StorageFailure` if the storage failed and a retry may succeed; else `UserError`.
    """
    reason = " ".join(str(error).split())[:300]
    kind = StorageFailure if is_storage_failure(error) else UserError
    return kind(f"{what} ({type(error).__name__}: {reason})")


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception, or its cause, means that the storage itself failed, rather than the stored data."""
    return any(_fails(each) for each in _chain(error))


def _fails(error: BaseException) -> bool:
    if isinstance(error, OSError) and not isinstance(error, _DAMAGE):
        return error.errno is not None or isinstance(error, (ConnectionError, TimeoutError))
    if any(_PASSING.search(kind.__name__) for kind in type(error).__mro__[:2]):
        return True
    # Excludes JAX's out-of-memory errors, which have the same prefix.
    of_tensorstore = isinstance(error, ValueError) or type(error) is RuntimeError
    return of_tensorstore and bool(_STATUS.search(str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package it is in
        return False


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


_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: pathlib.Path) -> None:
    """Checks the first bytes of a file.

    Raises:
        UserError: if it is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            raise UserError(f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder")
