"""What is a path of a bucket, and what is a failure of storage rather than a mistake."""

import errno
import pathlib
import sys

import jax
import pytest
from tensorflow import errors

from endistill_jax import storage
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.storage import check_folder, check_writable_place, local_path, reading_failure, stored_path


def test_a_path_of_a_bucket_stays_as_it_is():
    path = stored_path("gs://bucket/runs/student")
    assert [str(path), str(path / "x")] == ["gs://bucket/runs/student", "gs://bucket/runs/student/x"]


def test_a_local_path_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert stored_path("runs/student") == tmp_path / "runs/student"
    assert str(stored_path("~/run")) == "/home/somebody/run"


@pytest.mark.parametrize("path", ["s3://bucket/run", "hf://name/run", "file:///tmp/run", "gs://", "gs:///"])
def test_other_kinds_of_storage_are_refused(path):
    with pytest.raises(UserError, match="is not a place for files; give a local path, or gs://BUCKET/FOLDER"):
        stored_path(path)


def test_what_must_be_local_is_not_looked_for_in_a_folder_called_gs():
    assert local_path("runs/x", "copy it") == pathlib.Path("runs/x")
    with pytest.raises(UserError, match="gs://bucket/x is not local; copy it"):
        local_path("gs://bucket/x", "copy it")


def test_without_googles_package_no_run_begins_on_a_bucket(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    check_writable_place("/tmp/run")
    with pytest.raises(UserError, match=r"gs://bucket/run needs google\S+, .*pip install 'endistill-jax\[gcs\]'"):
        check_writable_place("gs://bucket/run")
    check_folder("gs://bucket/plans")


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be a folder: .*file is a file"):
        check_writable_place(tmp_path / "file/run")
    monkeypatch.setattr(storage.os, "access", lambda folder, mode: False)  # whoever runs the tests may write everywhere
    with pytest.raises(UserError, match="new/run cannot be written: you have no right to write to "):
        check_writable_place(tmp_path / "new/run")


def wrapped(error):
    """As Orbax raises what it met in TensorStore."""
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("Failed to restore /run/state") from cause
    except ValueError as outer:
        return outer


class ServiceUnavailable(Exception):
    """As Google's client of Cloud Storage calls it."""


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    ConnectionResetError("reset by peer"),
    TimeoutError("timed out"),
    errors.UnavailableError(None, None, "503"),
    errors.AbortedError(None, None, "All 10 retry attempts failed. The last failure: libcurl code 6"),
    ValueError('Error reading "gs://b/x": UNAVAILABLE: HTTP response code: 503'),
    ServiceUnavailable("503"),
    wrapped(ValueError("DEADLINE_EXCEEDED: no answer")),
]
LASTING = [
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "not yours"),
    ValueError("DATA_LOSS: checksum does not match"),
    ValueError("NOT_FOUND: no such array"),
    KeyError("params"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate"),
    wrapped(ValueError("shapes differ")),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_storage_that_fails_is_no_mistake_of_the_user(error):
    failure = reading_failure("checkpoint /run/3 cannot be restored", error)
    assert isinstance(failure, StorageFailure) and "\n" not in str(failure)
    assert str(failure).startswith(f"checkpoint /run/3 cannot be restored ({type(error).__name__}: ")


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_is_damaged_or_missing_stays_so(error):
    assert isinstance(reading_failure("checkpoint /run/3 cannot be restored", error), UserError)
