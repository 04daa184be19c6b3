"""Several hosts: how the processes of a run find each other.

A process of a run on several hosts is told of the others by three environment variables, the same on all of them but
for the last, or finds them where JAX knows the cluster (Cloud TPU slices, GKE, tasks of SLURM):

    ENDISTILL_COORDINATOR     host:port of process 0, reachable from all
    ENDISTILL_NUM_PROCESSES   how many there are; 1 alone means: by itself, whatever the cluster says
    ENDISTILL_PROCESS_ID      which one this is, from 0

ENDISTILL_CONNECT_SECONDS is how long it waits for them, 300 if it is not set: more where slices come one by one.
What they then agree on is in `agreement`, how they end in `ending`.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from endistill_jax.core.errors import HostMissing, UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "ENDISTILL_COORDINATOR", "ENDISTILL_NUM_PROCESSES", "ENDISTILL_PROCESS_ID"
CONNECT_SECONDS = "ENDISTILL_CONNECT_SECONDS"


def connect_seconds() -> int:
    """How long to wait for the other hosts.

    Raises:
        UserError: the variable is no number of seconds.
    """
    given = os.environ.get(CONNECT_SECONDS) or "300"
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{CONNECT_SECONDS} is {given!r}; it must be a whole number of seconds, at least 1")
    return int(given)


def initialize() -> None:
    """Joins the other hosts of the run, if there are any; before JAX looks for devices. Does nothing a second time.

    Raises:
        UserError: variables that do not fit each other.
        HostMissing: the service by which hosts meet cannot be started, or the cluster does not tell who they are.
            Where hosts do not come, this process ends with code 1 and says so: JAX does not return.
    """
    if jax.distributed.is_initialized():
        return
    settings = _from_environment(os.environ)
    if settings is None or settings.get("num_processes") == 1:
        return
    seconds = connect_seconds()
    # Its handler of SIGTERM would take the place of ours: hosts agree to stop at a step that is logged.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would abort with a stack trace.
    alone = threading.Timer(seconds, _give_up, (settings, seconds))
    alone.daemon = True
    alone.start()
    try:
        jax.distributed.initialize(**settings, initialization_timeout=seconds + 60)
    except ValueError as error:
        # The variables were checked: it is the cluster, such as a metadata server that does not answer after a reboot.
        raise HostMissing(f"could not find other hosts ({error}); {NUM_PROCESSES}=1 runs by itself") from error
    except RuntimeError as error:
        raise HostMissing(f"could not join other hosts: {' '.join(str(error).split())[:200]}") from error
    finally:
        alone.cancel()


def _give_up(settings: Mapping[str, Any], seconds: float) -> None:
    who = "the other hosts of the cluster that JAX found"
    if settings:
        who = f"all {settings['num_processes']} processes of {COORDINATOR}={settings['coordinator_address']}"
    print(f"endistill: error: {who} did not come together within {seconds} s; start all of them", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _from_environment(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None for a process that is alone.

    Raises:
        UserError: variables that are missing or malformed.
    """
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    given = [name for name in names if variables.get(name)]
    if given == [NUM_PROCESSES] and variables[NUM_PROCESSES] == "1":
        return None
    if not given:
        return {} if _in_cluster(variables) else None
    if missing := [name for name in names if name not in given]:
        raise UserError(f"{', '.join(given)} without {', '.join(missing)}; several hosts need all three")
    host, _, port = variables[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{COORDINATOR} is {variables[COORDINATOR]!r}; it must be host:port of process 0")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not variables[name].isdecimal():
            raise UserError(f"{name} is {variables[name]!r}; it must be a whole number")
    count, index = int(variables[NUM_PROCESSES]), int(variables[PROCESS_ID])
    if count < 1:
        raise UserError(f"{NUM_PROCESSES} is {count}; it must be at least 1")
    if index >= count:
        raise UserError(f"{PROCESS_ID} is {index} of {NUM_PROCESSES}={count}; it must be one of 0 to {count - 1}")
    return {
        "coordinator_address": variables[COORDINATOR],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",  # which would give a task of SLURM one of its GPUs alone
    }


def _in_cluster(variables: Mapping[str, str]) -> bool:
    """Whether JAX finds the other hosts by itself: tasks of a step of SLURM, and TPU hosts of GKE or Cloud TPU."""
    if "SLURM_STEP_NODELIST" in variables:
        return int(variables.get("SLURM_NTASKS", "1")) > 1
    if not variables.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return False
    if workers := variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES"):
        return "," in workers or int(variables.get("MEGASCALE_NUM_SLICES") or 1) > 1
    # Importing JAX sets this where there is no TPU; a user sets it where a TPU host has no metadata server.
    return "TPU_SKIP_MDS_QUERY" not in variables


def _state() -> Any:
    """JAX's own record of how processes joined: `client`, `num_processes`, `process_id`.

    The one place where this package uses what JAX keeps to itself, as Orbax does too: up to 0.12 JAX has no public name
    for the key-value store of its coordination service, nor for these numbers before there are devices.
    """
    from jax._src import distributed

    return distributed.global_state


def client() -> Any:
    """JAX's client of the coordination service, None in a process that joined no others."""
    return _state().client


def process_count() -> int:
    """How many processes joined; unlike `jax.process_count`, known before there are devices."""
    return _state().num_processes


def process_index() -> int:
    """Which of them this is; unlike `jax.process_index`, known before there are devices."""
    return _state().process_id


@contextlib.contextmanager
def first_process_prints() -> Iterator[None]:
    """Meanwhile nothing that other processes than the first print to standard output is seen."""
    # The first of JAX's numbering, which jobs go by: TPUs have one of their own.
    if process_count() == 1 or jax.process_index() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def require_one_process(job: str) -> None:
    """Refuses several processes for a job that would do the same in each of them.

    Raises:
        UserError: if there are several.
    """
    if process_count() > 1:
        raise UserError(f"{job} is a job for one process, and there are {process_count()}; set {NUM_PROCESSES}=1")


def gather(values: Sequence[int]) -> np.ndarray:
    """Every process's integers, int64 [processes, values]. All must call it; it waits for what they compute."""
    mine = np.asarray(values, np.int64)
    if jax.process_count() == 1:
        return mine[None]
    # Devices have no 64-bit integers by default; halves pass unharmed.
    return multihost_utils.process_allgather(mine.view(np.uint32)).view(np.int64)
