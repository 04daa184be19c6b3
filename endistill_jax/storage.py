"""Local folders, written atomically, and Google Cloud Storage (`gs://bucket/folder`)."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.extras import GCS, require

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
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a scheme, such as `gs://bucket/folder`."""
    return "://" in os.fspath(path)


def stored_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path as it is opened: absolute if local, unchanged if in a bucket."""
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(text).expanduser().resolve()
    if not text.startswith(BUCKET) or not text.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{text} is not a place for files; give a local path, or {BUCKET}BUCKET/FOLDER")
    return epath.Path(text)  # `resolve` would turn it into a local folder called "gs:"


def local_path(
    path: str | os.PathLike[str], advice: str = "write to a local folder and copy it with 'gcloud storage cp -r'"
) -> pathlib.Path:
    """A path that must be local: of one in a bucket, pathlib would make a local folder called "gs:"."""
    if is_remote(path):
        raise UserError(f"{path} is not local; {advice}")
    return pathlib.Path(path).expanduser()


def check_folder(path: str | os.PathLike[str]) -> None:
    """Checks, as far as possible without writing, that a folder exists or can be created, and is writable."""
    place = stored_path(path)
    if is_remote(path):
        return
    existing = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
    if not os.path.isdir(existing):
        raise UserError(f"{path} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: you have no right to write to {existing}")


def check_writable_place(path: str | os.PathLike[str]) -> None:
    """`check_folder` for checkpoints; also checks that Orbax can write to buckets."""
    check_folder(path)
    if is_remote(path):
        require("google.cloud.storage", f"writing checkpoints to {path}", GCS)


def check_free(path: pathlib.Path, *, overwrite: bool = False, marker: str = "config.json") -> None:
    """Checks that a folder may be written under this name: there is none, it is empty, or it may be overwritten.

    Args:
        path: the name.
        overwrite: whether a folder that holds the marker may be replaced.
        marker: a file by which a folder is known to be what will be written.
    """
    check_folder(path)
    check_folder(path.absolute().parent)  # where it is renamed
    if path.is_dir():
        if any(path.iterdir()) and not (overwrite and (path / marker).is_file()):
            raise UserError(f"{path} is not empty; give a folder that does not exist yet")
        if os.path.ismount(path) or path.resolve() == pathlib.Path.cwd():
            raise UserError(f"{path} is mounted, or the current folder, and cannot be renamed; give a folder inside it")


@contextlib.contextmanager
def replace_folder(
    path: pathlib.Path, *, overwrite: bool = False, marker: str = "config.json"
) -> Iterator[pathlib.Path]:
    """Yields a temporary folder next to `path`; it is renamed on success and removed on failure.

    `overwrite` and `marker` are those of `check_free`.
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
                # A rename can reach the disk before the content: without fsync a power cut leaves empty files.
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        _swap(partial, path)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
        # Orbax and TensorStore report a full disk in several types.
        full = os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in str(error) else None
        if isinstance(error, UserError) or not (full or isinstance(error, OSError)):
            raise
        raise UserError(f"could not write {path}: {full or error.strerror or error}; nothing was left there") from error


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


def refuse_lfs_pointer(path: pathlib.Path | epath.Path) -> None:
    """Refuses what git leaves in place of a large file if git-lfs is not installed."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder")


def reading_failure(what: str, error: Exception) -> UserError | StorageFailure:
    """The one-line error to raise where `what`, such as "checkpoint /runs/x cannot be restored", is due to `error`.

    `StorageFailure` if the storage failed and a retry may succeed; else `UserError`.
    """
    reason = " ".join(str(error).split())[:300]
    kind = StorageFailure if is_storage_failure(error) else UserError
    return kind(f"{what} ({type(error).__name__}: {reason})")


def is_storage_failure(error: BaseException | None) -> bool:
    """Whether an exception, or its cause, means that the storage itself failed, rather than the stored data."""
    while error is not None:
        if _fails(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fails(error: BaseException) -> bool:
    if isinstance(error, OSError) and not isinstance(error, _DAMAGE):
        return error.errno is not None or isinstance(error, (ConnectionError, TimeoutError))
    if any(_PASSING.search(kind.__name__) for kind in type(error).__mro__[:2]):
        return True
    # Excludes JAX's out-of-memory errors, which have the same prefix.
    of_tensorstore = isinstance(error, ValueError) or type(error) is RuntimeError
    return of_tensorstore and bool(_STATUS.search(str(error)))
