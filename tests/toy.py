"""Jobs small enough to check what main and config make of gin files; imported by the gin files of their tests."""

import os
import pathlib
import signal

from endistill_jax.core.errors import Stopped, StorageFailure, UserError

CALLS = []
interrupted, zero_division = KeyboardInterrupt, ZeroDivisionError


def job(*, steps: int = 1, rate: float = 0.5, name: str | None = None, part=None, error=None, dry_run: bool = False):
    """Notes its call, then sends its process the signal `error`, or raises what `error` returns."""
    CALLS.append({"steps": steps, "rate": rate, "name": name, "part": part, "dry_run": dry_run})
    if isinstance(error, int):
        os.kill(os.getpid(), error)
    if error is not None:
        raise error()


def part(*, size: int, **others: str):
    return (size, others) if others != {"label": "wrong"} else {}["wrong"]


def write(text: str, name: str = "run.gin") -> str:
    """Writes a gin file and returns the flag that names it."""
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_text(text)
    return f"--gin_file={name}"


def stopped():
    return Stopped("stopped at step 7", signal.SIGTERM)


def stopped_by_hand():
    return Stopped("stopped at step 7", signal.SIGINT)


def user_error():
    return UserError("that is wrong; this would be right")


def storage_failure():
    return StorageFailure("checkpoint gs://bucket/run/3 cannot be restored (UnavailableError: 503)")
