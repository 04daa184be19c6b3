"""What a model directory tells of how its run was started: `command.sh` and `config.gin`."""

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
        config: gives the configuration that the job was called with, as text.
    """

    command: Sequence[str]
    config: Callable[[], str]


_launch: contextvars.ContextVar[Launch | None] = contextvars.ContextVar("launch", default=None)


@contextlib.contextmanager
def started_by(launch: Launch) -> Iterator[None]:
    """Says how the jobs that run inside were started."""
    token = _launch.set(launch)
    try:
        yield
    finally:
        _launch.reset(token)


def write_run_files(model_dir: str | os.PathLike[str]) -> None:
    """Writes `command.sh` and `config.gin` to a model directory, when there is something to tell.

    A job that is called from plain Python was started by no command that is known here: nothing is written then.
    """
    launch = _launch.get()
    if launch is None:
        return
    command = shlex.join(launch.command)
    script = f"#!/bin/sh\n# Written by endistill-jax {__version__}; goes on where the run stopped, if it did.\n"
    write_atomically(f"{os.fspath(model_dir)}/command.sh", f"{script}cd {shlex.quote(os.getcwd())} && {command}\n")
    write_atomically(f"{os.fspath(model_dir)}/config.gin", launch.config())
