"""Several hosts: connected, in agreement, and shut down together.

Three environment variables describe a run, all but the last the same on every host. Where JAX detects the cluster by
itself (Cloud TPU slices, GKE, SLURM tasks) they are not needed:

    ENDISTILL_COORDINATOR     host:port of process 0, reachable from all
    ENDISTILL_NUM_PROCESSES   how many there are; 1 alone disables cluster detection
    ENDISTILL_PROCESS_ID      which one this is, from 0

ENDISTILL_CONNECT_SECONDS is the connection timeout, 300 by default; raise it where slices are provisioned one by one.

Before anything is computed, hosts check that they run with the same settings. They exchange values through the
key-value store of JAX's coordination service, not through devices, so a host with different shapes, or one that never
arrives, cannot make the others hang.

A process that fails reports it in the same store, which every process polls once a second: the others would else hang
in a collective. A checkpoint being written still needs all processes, so one that fails during training first closes
what it has open, for at most `GRACE_SECONDS`, and the others wait for that. A process that is killed cannot report
anything: JAX ends the others when its heartbeats stop (100 s), or at once if it was process 0.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from endistill_jax import __version__
from endistill_jax.checkpoints.manifest import flattened
from endistill_jax.core.errors import HostMissing, Stopped, UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "ENDISTILL_COORDINATOR", "ENDISTILL_NUM_PROCESSES", "ENDISTILL_PROCESS_ID"
CONNECT_SECONDS = "ENDISTILL_CONNECT_SECONDS"

# Timeout for the other hosts, which may load a model more slowly.
AGREE_SECONDS = 1800
GRACE_SECONDS = 30.0
POLL_SECONDS = 1.0

# Packages whose version affects results or the order of batches.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio", "tensorflow", "sentencepiece")

# Keys of the coordination service's store.
_FAILED, _GONE, _ENDED = "endistill/failed", "endistill/gone", "endistill/ended"
_topics = itertools.count()


# ---- Connecting ----


def initialize() -> None:
    """Joins the other hosts of the run, if any. Must run before JAX looks for devices; later calls are no-ops.

    Raises:
        UserError: the variables are inconsistent.
        HostMissing: the coordination service cannot be started, or cluster detection fails.
            Where hosts do not come, this process ends with code 1 and says so: JAX does not return.
    """
    if jax.distributed.is_initialized():
        return
    settings = _from_environment(os.environ)
    if settings is None or settings.get("num_processes") == 1:
        return
    seconds = connect_seconds()
    # JAX's SIGTERM handler would replace ours, with which hosts agree to stop at a logged step.
    jax.config.update("jax_enable_preemption_service", False)
    # Ours fires first: JAX would abort with a stack trace.
    timeout = threading.Timer(seconds, _give_up, (settings, seconds))
    timeout.daemon = True
    timeout.start()
    try:
        jax.distributed.initialize(**settings, initialization_timeout=seconds + 60)
    except ValueError as error:
        # The variables are valid, so the cluster is at fault, e.g. a metadata server not answering after a reboot.
        raise HostMissing(f"could not find other hosts ({error}); {NUM_PROCESSES}=1 runs by itself") from error
    except RuntimeError as error:
        raise HostMissing(f"could not join other hosts: {' '.join(str(error).split())[:200]}") from error
    finally:
        timeout.cancel()


def connect_seconds() -> int:
    """How long to wait for the other hosts."""
    given = os.environ.get(CONNECT_SECONDS) or "300"
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{CONNECT_SECONDS} is {given!r}; it must be a whole number of seconds, at least 1")
    return int(given)


def _give_up(settings: Mapping[str, Any], seconds: float) -> None:
    who = "the other hosts of the cluster that JAX found"
    if settings:
        who = f"all {settings['num_processes']} processes of {COORDINATOR}={settings['coordinator_address']}"
    print(f"endistill: error: {who} did not come together within {seconds} s; start all of them", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _from_environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, none where JAX detects the cluster; None for a single process."""
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = [name for name in names if variables.get(name)]
    if given == [NUM_PROCESSES] and variables[NUM_PROCESSES] == "1":
        return None
    if not given:
        return {} if _in_cluster(variables) else None
    if missing := [name for name in names if name not in given]:
        raise UserError(f"{', '.join(given)} without {', '.join(missing)}; several hosts need all three")
    coordinator, count, index = (variables[name] for name in names)
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"{COORDINATOR} is {coordinator!r}; it must be host:port of process 0")
    if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
        raise UserError(f"{PROCESS_ID} is {index!r} of {NUM_PROCESSES}={count!r}; they are numbered from 0")
    return {
        "coordinator_address": coordinator,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",  # else JAX would give a SLURM task only one of its GPUs
    }


def _in_cluster(variables: Mapping[str, str]) -> bool:
    """Whether JAX detects the cluster by itself: tasks of a SLURM step, and TPU hosts of GKE or Cloud TPU."""
    if "SLURM_STEP_NODELIST" in variables:
        return int(variables.get("SLURM_NTASKS", "1")) > 1
    if not variables.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return False
    if workers := variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES"):
        return "," in workers or int(variables.get("MEGASCALE_NUM_SLICES") or 1) > 1
    # Set by JAX on import where there is no TPU, and by users where a TPU host has no metadata server.
    return "TPU_SKIP_MDS_QUERY" not in variables


def _state() -> Any:
    """JAX's own record of how processes joined: `client`, `num_processes`, `process_id`."""
    # The only use of JAX internals in this package. `jax.distributed` has `initialize`, `is_initialized` and `shutdown`
    # alone: up to JAX 0.12 nothing public gives the key-value store of the coordination service (Orbax takes it from
    # here too), and `jax.process_count()` and `jax.process_index()` initialize the backends.
    from jax._src import distributed

    return distributed.global_state


def client() -> Any:
    """JAX's client of the coordination service; None in a single-process run."""
    return _state().client


def process_count() -> int:
    """Number of processes; unlike `jax.process_count`, does not initialize backends."""
    return _state().num_processes


def process_index() -> int:
    """Index of this process; unlike `jax.process_index`, does not initialize backends."""
    return _state().process_id


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Silences standard output on every process but the primary one."""
    # By `jax.process_index`, as jobs do: TPUs may number processes differently.
    if process_count() == 1 or jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def require_one_process(job: str) -> None:
    """Refuses multi-process runs of a job that would only repeat the same work in each process."""
    if process_count() > 1:
        raise UserError(f"{job} is a job for one process, and there are {process_count()}; set {NUM_PROCESSES}=1")


def gather(values: Sequence[int]) -> np.ndarray:
    """Every process's integers, int64 [processes, values]. All must call it; it waits for what they compute."""
    mine = np.asarray(values, np.int64)
    if jax.process_count() == 1:
        return mine[None]
    # Devices have no 64-bit integers by default; halves pass unharmed.
    return multihost_utils.process_allgather(mine.view(np.uint32)).view(np.int64)


# ---- Agreement ----


def agree(topic: str, settings: Mapping[str, Any], seconds: float = AGREE_SECONDS) -> None:
    """Blocks until every process has called this with the same settings; a no-op in a single process.

    Every process must make its calls in the same order.

    Args:
        topic: what the settings are about, for messages.
        settings: plain values in nested dictionaries.
        seconds: how long to wait for the others.

    Raises:
        UserError: on every process, naming each difference and which processes have which value.
        HostMissing: naming a process that did not report in time.
    """
    if process_count() == 1:
        return
    prefix = f"endistill/{next(_topics)}/{topic}"
    client().key_value_set(f"{prefix}/{process_index()}", json.dumps(flattened(settings)))
    until = time.monotonic() + seconds
    reported = []
    for index in range(process_count()):
        milliseconds = max(1, round(1000 * (until - time.monotonic())))
        try:
            reported.append(json.loads(client().blocking_key_value_get(f"{prefix}/{index}", milliseconds)))
        except jax.errors.JaxRuntimeError as error:
            raise HostMissing(
                f"process {index} of {process_count()} sent no {topic} within {seconds:.0f} s; see its output"
            ) from error
    if differences := describe_differences(reported):
        raise UserError(f"the hosts disagree on their {topic}: {'; '.join(differences)}")


def describe_differences(reported: Sequence[Mapping[str, str]]) -> list[str]:
    """One phrase per setting that differs between processes (in order): each value, and which processes have it."""
    phrases = []
    for name in sorted(set().union(*reported)):
        processes: dict[str, list[str]] = {}
        for index, settings in enumerate(reported):
            processes.setdefault(settings.get(name, "absent"), []).append(str(index))
        if len(processes) == 1:
            continue
        shown = []
        for value, who in processes.items():
            value = value if len(value) <= 120 else f"{value[:120]}..."
            listed = ", ".join(who if len(who) <= 8 else [*who[:8], "..."])
            shown.append(f"{value} on {'process' if len(who) == 1 else 'processes'} {listed}")
        phrases.append(f"{name} is {' and '.join(shown)}")
    return phrases


def agree_on_folder(folder: str) -> None:
    """Checks that all processes see the same folder, rather than a local one of the same name each."""
    if process_count() == 1:
        return
    mark = epath.Path(folder).expanduser() / ".seen_by_all_hosts"
    if process_index() == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(uuid.uuid4().hex)
    agree("start", {})  # barrier: the mark is written
    try:
        agree("folder, which must be one that all of them share", {folder: mark.read_text() if mark.exists() else None})
    finally:
        if process_index() == 0:
            mark.unlink(missing_ok=True)


def code_versions() -> dict[str, Any]:
    """Versions of this package (with a digest of its source), Python, and the packages that affect results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "endistill_jax": {"version": __version__, "source": _source_digest()},
        "python": platform.python_version(),
        "packages": versions,
    }


def _source_digest() -> str:
    """SHA-256 of every Python file of this package with its name."""
    package = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    # `glob`, not `rglob`, follows links: in a checkout `tasks` is one.
    for name in sorted(glob.glob("**/*.py", root_dir=package, recursive=True)):
        content = (package / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


# ---- Shutting down ----


def watch_peers() -> None:
    """From now on this process ends when another one of the run fails. A no-op in a single-process run."""
    if process_count() > 1:
        threading.Thread(target=_watch, name="endistill-watch", daemon=True).start()


def shutdown_all(line: str, code: int) -> int:
    """Ends all processes of the run with this code after a failure; in a single-process run returns the code.

    The other processes print `line`, what went wrong, with the number of this process.
    """
    if process_count() == 1:
        return code
    _report(line, code)
    _put(_GONE, "1")
    _quit(code)


@contextlib.contextmanager
def reporting_failure() -> Iterator[None]:
    """Reports an exception to the others as soon as it is raised, before enclosing contexts are closed."""
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
    _put(_FAILED, json.dumps({"process": process_index(), "line": line, "code": code}))


def _watch() -> None:
    while jax.distributed.is_initialized():
        if failure := _get(_FAILED):
            _follow(**json.loads(failure))
        time.sleep(POLL_SECONDS)


def _follow(process: int, line: str, code: int) -> None:
    """Ends this process once the failed one is gone, or its grace period is over."""
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until and not _get(_GONE):
        time.sleep(POLL_SECONDS / 4)
    if process != process_index():
        print(f"endistill: process {process} failed: {line}", file=sys.stderr)
    _quit(code)


def _quit(code: int) -> None:
    """Exits immediately: a regular exit would wait for hosts that wait for this one."""
    _put(f"{_ENDED}/{process_index()}", "1")
    if process_index() == 0:  # the store ends with process 0, and JAX aborts whoever still uses it
        until = time.monotonic() + 5
        others = range(1, process_count())
        while time.monotonic() < until and not all(_get(f"{_ENDED}/{index}") for index in others):
            time.sleep(POLL_SECONDS / 10)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _put(key: str, value: str) -> None:
    # Fails where another process was first, or the service is shut down.
    with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):
        client().key_value_set(key, value)


def _get(key: str) -> str | None:
    try:
        return client().key_value_try_get(key)
    except (jax.errors.JaxRuntimeError, AttributeError):  # no such key, or the service is shut down
        return None
