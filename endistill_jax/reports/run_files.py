"""`command.sh` and `config.gin`, which record in a model directory how its run was started."""

import contextlib
import contextvars
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Sequence

from endistill_jax import __version__
from endistill_jax.reports.files import write_atomically


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
    """Writes `command.sh` and `config.gin` to a model directory, if the command is known.

    Writes nothing for a job that is called from plain Python.
    """
    launch = _launch.get()
    if launch is None:
        return
    command = shlex.join(launch.command)
    script = f"#!/bin/sh\n# Written by endistill-jax {__version__}; resumes the run if it was stopped.\n"
    write_atomically(f"{os.fspath(model_dir)}/command.sh", f"{script}cd {shlex.quote(os.getcwd())} && {command}\n")
    write_atomically(f"{os.fspath(model_dir)}/config.gin", launch.config())
