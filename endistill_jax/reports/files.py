"""Files of a job: written atomically, as JSON that any reader accepts, and as a log that resumes."""

import contextlib
import contextvars
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from endistill_jax import __version__
from endistill_jax.checkpoints.manifest import check_same
from endistill_jax.core.errors import UserError
from endistill_jax.storage import local_path, stored_path

NUMBER = "line"


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file, and its folder: a reader, or a crash, sees the old file or the new one and never a part."""
    target = stored_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(target)  # `os.replace` locally, a rename in object stores
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The standard-conforming JSON text of nested dicts and lists of numbers, strings and arrays.

    Floats keep every bit (float32 is exact in JSON's float64). JSON has no NaN or infinity: those become the strings
    "nan", "inf" and "-inf", which `float()` reads back.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(np.asarray(value).tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How the running program was started.

    Attributes:
        command: the words of a command that starts it again.
        config: returns the configuration of the job as text.
    """

    command: Sequence[str]
    config: Callable[[], str]


_launch: contextvars.ContextVar[Launch | None] = contextvars.ContextVar("launch", default=None)


@contextlib.contextmanager
def started_by(launch: Launch) -> Iterator[None]:
    """Context that records how the jobs inside were started."""
    token = _launch.set(launch)
    try:
        yield
    finally:
        _launch.reset(token)


def write_run_files(model_dir: str | os.PathLike[str]) -> None:
    """Writes how the run was started, `command.sh` and `config.gin`; nothing for a job called from plain Python."""
    launch = _launch.get()
    if launch is None:
        return
    command = shlex.join(launch.command)
    script = f"#!/bin/sh\n# Written by endistill-jax {__version__}; resumes the run if it was stopped.\n"
    write_atomically(f"{os.fspath(model_dir)}/command.sh", f"{script}cd {shlex.quote(os.getcwd())} && {command}\n")
    write_atomically(f"{os.fspath(model_dir)}/config.gin", launch.config())


class Done(NamedTuple):
    """What an earlier attempt has written.

    Attributes:
        last: number of the last complete record, 0 if there is none.
        records: number of complete records.
        marked: how many of them have a true value under each requested key.
        length: bytes up to the end of the last complete record.
    """

    last: int = 0
    records: int = 0
    marked: Mapping[str, int] = {}
    length: int = 0


class RecordLog:
    """A resumable JSONL file of records with ascending numbers under `line`: none is lost or written twice.

    `<file>.run.json` has the manifest of their settings.
    """

    def __init__(self, path: str | os.PathLike[str]):
        # Not in an object store, where no file can grow.
        self._path = local_path(path, "give a local file, since records are added to it as they are made")
        if self._path.is_dir():
            raise UserError(f"{path} is a folder; give a file in it")
        self._manifest_path = self._path.with_name(f"{self._path.name}.run.json")

    def check(self, manifest: Mapping[str, Any], *, unknown: Iterable[str] = ()) -> None:
        """Checks that an existing file is from the same job; reads no record.

        Args:
            manifest: settings of the records; plain values in nested dictionaries.
            unknown: names of entries that are not known yet.

        Raises:
            UserError: the file has a different manifest (each difference is named), or none.
        """
        if not self._manifest_path.exists():
            if self._path.exists():
                raise UserError(f"{self._path} is there already, and not from this job; give another output file")
            return
        try:
            saved = json.loads(self._manifest_path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(
                f"{self._manifest_path} is damaged; remove it and {self._path} to start from scratch"
            ) from None
        saved = {name: value for name, value in saved.items() if name not in unknown}
        check_same(saved, json.loads(json_text(manifest)), str(self._path))

    def read(self, manifest: Mapping[str, Any], count: Iterable[str] = ()) -> Done:
        """Checks an existing file like `check`, and reads it.

        Args:
            manifest: see `check`.
            count: keys whose true values are counted.
        """
        self.check(manifest)
        last = records = length = 0
        marked = dict.fromkeys(count, 0)
        with self._path.open("rb") if self._path.exists() else open(os.devnull, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break  # cut off in writing
                try:
                    record = json.loads(raw)
                    last = int(record[NUMBER])
                except (ValueError, TypeError, KeyError):
                    raise UserError(f"line {records + 1} of {self._path} is no record of this job") from None
                for key in marked:
                    marked[key] += bool(record.get(key))
                records, length = records + 1, length + len(raw)
        return Done(last, records, marked, length)

    def start(self, manifest: Mapping[str, Any], done: Done) -> None:
        """Writes the manifest, and removes a truncated record."""
        write_atomically(self._manifest_path, json_text(manifest, indent=2) + "\n")
        with self._path.open("ab") as file:
            file.truncate(done.length)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records; they are on disk when this returns."""
        text = "".join(json_text(record) + "\n" for record in records)
        with self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
