"""Shuts all hosts down together: a failing process notifies the others, which would else hang in a collective.

The first failure is stored in the key-value store of JAX's coordination service, which every process polls once a
second. A checkpoint being written still needs all processes, so one that fails during training first closes what it
has open, for at most `GRACE_SECONDS`, and the others wait for that. A process that is killed cannot notify anyone:
JAX ends the others when its heartbeats stop (100 s), or at once if it was process 0.
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
    """From now on this process ends when another one of the run fails. A no-op in a single-process run."""
    if process_count() > 1:
        threading.Thread(target=_watch, name="endistill-watch", daemon=True).start()


def leave(line: str, code: int) -> int:
    """Ends this process and all others of the run after a failure; in a single-process run returns the code.

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
    """Notifies the others of an exception as soon as it is raised, before enclosing contexts are closed."""
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
    """Ends this process once the failed one is gone, or its grace period is over."""
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until and not _told(_GONE):
        time.sleep(LOOK_SECONDS / 4)
    if process != process_index():
        print(f"endistill: process {process} failed: {line}", file=sys.stderr)
    _quit(code)


def _quit(code: int) -> None:
    """Exits immediately: a regular exit would wait for hosts that wait for this one."""
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
    with contextlib.suppress(
        jax.errors.JaxRuntimeError, AttributeError
    ):  # another process was first, or the service is shut down
        client().key_value_set(key, value)


def _told(key: str) -> str | None:
    try:
        return client().key_value_try_get(key)
    except (jax.errors.JaxRuntimeError, AttributeError):  # no such key, or the service is shut down
        return None
