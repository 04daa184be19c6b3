"""Several hosts end together: one that fails tells the others, which would wait minutes for it in a collective.

The first failure is kept in the key-value store of JAX's coordination service, which every process looks at once a
second. While a checkpoint is being written all of them still have to answer, so a process that fails within a training
first closes what it has open, for at most `GRACE_SECONDS`, and the others wait for that. A process that is killed tells
nothing: JAX ends the others when it misses its heartbeats (100 s), or at once if it was process 0.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

from endistill_jax.core.errors import Stopped, UserError
from endistill_jax.multihost.initialize import client, process_count, process_index

GRACE_SECONDS = 30.0
LOOK_SECONDS = 1.0
_FAILED, _GONE, _ENDED = "endistill/failed", "endistill/gone", "endistill/ended"


def watch() -> None:
    """From now on this process ends when another one of the run has failed. A process that is alone watches nothing."""
    if process_count() > 1:
        threading.Thread(target=_watch, name="endistill-watch", daemon=True).start()


def leave(line: str, code: int) -> int:
    """Ends this process and all others of the run, after a failure; returns the code in a process that is alone.

    Args:
        line: what went wrong; the others print it with the number of this process.
        code: exit code of all of them.
    """
    if process_count() == 1:
        return code
    _report(line, code)
    _tell(_GONE, "1")
    _quit(code)


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Tells the others of an exception as soon as it is there, before anything that surrounds this one is closed."""
    try:
        yield
    except Stopped:  # all hosts agreed on that
        raise
    except BaseException as error:
        if process_count() > 1:
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            _report(line, 2 if isinstance(error, UserError) else 1)
        raise


def _report(line: str, code: int) -> None:
    _tell(_FAILED, json.dumps({"process": process_index(), "line": line, "code": code}))


def _watch() -> None:
    while jax.distributed.is_initialized():
        if failure := _told(_FAILED):
            _follow(**json.loads(failure))
        time.sleep(LOOK_SECONDS)


def _follow(process: int, line: str, code: int) -> None:
    """Ends this process once the one that failed is gone, or has had its time."""
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until and not _told(_GONE):
        time.sleep(LOOK_SECONDS / 4)
    if process != process_index():
        print(f"endistill: process {process} failed: {line}", file=sys.stderr)
    _quit(code)


def _quit(code: int) -> None:
    """Ends at once: a regular exit would wait for hosts that wait for this one."""
    _tell(f"{_ENDED}/{process_index()}", "1")
    if process_index() == 0:  # the store ends with process 0, and JAX aborts whoever still uses it
        until = time.monotonic() + 5
        others = range(1, process_count())
        while time.monotonic() < until and not all(_told(f"{_ENDED}/{index}") for index in others):
            time.sleep(LOOK_SECONDS / 10)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _tell(key: str, value: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):  # somebody was first, or it was shut down
        client().key_value_set(key, value)


def _told(key: str) -> str | None:
    try:
        return client().key_value_try_get(key)
    except (jax.errors.JaxRuntimeError, AttributeError):  # not there, or the service was shut down meanwhile
        return None
