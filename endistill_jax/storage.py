"""Where runs are kept: folders of this machine, and those of Google Cloud Storage (`gs://bucket/folder`)."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator

from etils import epath

from endistill_jax.core.errors import StorageFailure, UserError

BUCKET = "gs://"
# Of storage that cannot be reached or is overloaded, by the names of RPC systems, TensorFlow and Google's clients. A
# file that is damaged or missing is none of these.
_PASSING = re.compile(
    r"unavailable|deadline_?exceeded|resource_?exhausted|aborted(error)?$|internal(error|servererror)?$|cancelled"
    r"|too_?many_?requests|gateway_?timeout|bad_?gateway|retryerror|connectionerror|timeouterror|transporterror",
    re.IGNORECASE,
)
# How TensorStore begins the message of a ValueError.
_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|INTERNAL|CANCELLED)\b")
_DAMAGE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one with a scheme, such as `gs://bucket/folder`."""
    return "://" in os.fspath(path)


def stored_path(path: str | os.PathLike[str]) -> epath.Path:
    """A path as it is opened: a local one absolute, one of a bucket as it is.

    Raises:
        UserError: for another kind of storage.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return epath.Path(text).expanduser().resolve()
    if not text.startswith(BUCKET) or not text.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{text} is not a place for files; give a local path, or {BUCKET}BUCKET/FOLDER")
    return epath.Path(text)  # `resolve` would make a local folder called "gs:" of it


def local_path(path: str | os.PathLike[str], advice: str) -> pathlib.Path:
    """A path of this machine.

    Args:
        path: what the user gave.
        advice: what to do instead with one that is elsewhere.

    Raises:
        UserError: if it is on a bucket: pathlib would make a local folder called "gs:" of it.
    """
    if is_remote(path):
        raise UserError(f"{path} is not local; {advice}")
    return pathlib.Path(path).expanduser()


def check_folder(path: str | os.PathLike[str]) -> None:
    """Makes sure that files can go to a folder that is there or will be made, as far as it shows without writing one.

    Raises:
        UserError: for another kind of storage than a local folder or a bucket, a file where the folder should be, or a
            folder that you may not write to.
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
    """Makes sure that checkpoints can go to a folder, as `check_folder` does, and that Orbax can write to buckets.

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
    """What to raise, in one line, for whatever went wrong while something was read.

    Args:
        what: and what happened to it, such as "checkpoint /runs/x cannot be restored".
        error: the exception.

    Returns:
        `StorageFailure` where the storage failed, so that another attempt may do better; else `UserError`.
    """
    reason = " ".join(str(error).split())[:300]
    kind = StorageFailure if is_storage_failure(error) else UserError
    return kind(f"{what} ({type(error).__name__}: {reason})")


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, tells that the storage failed: nothing about what is stored."""
    return any(_fails(each) for each in _chain(error))


def _fails(error: BaseException) -> bool:
    if isinstance(error, OSError) and not isinstance(error, _DAMAGE):
        return error.errno is not None or isinstance(error, (ConnectionError, TimeoutError))
    if any(_PASSING.search(kind.__name__) for kind in type(error).__mro__[:2]):
        return True
    # Not what JAX says of a device's memory, which begins alike.
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
