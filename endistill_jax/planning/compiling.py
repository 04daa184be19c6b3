"""Runs one compilation in a process with limits on time and memory."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.planning.request import StepRequest
from endistill_jax.planning.topologies import Topology, environment

WORKER = (sys.executable, "-m", "endistill_jax.planning.worker")
LIBTPU = "libtpu"
# Polling interval of a running compilation's memory.
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of one compilation on the planning host.

    Attributes:
        seconds: its time.
        memory: bytes of its resident memory.
    """

    seconds: float = 1800.0
    memory: int = int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_compilers(topologies: Sequence[Topology]) -> None:
    """Checks that the compiler is installed.

    Raises:
        UserError: naming what to install.
    """
    for topology in topologies:
        if not topology.is_proxy and importlib.util.find_spec(LIBTPU) is None:
            raise UserError(
                f"compiling for {topology.name} needs libtpu, which is not installed; "
                "install the extra `plan`: pip install 'endistill-jax[plan]'"
            )


def compile_bounded(request: StepRequest, bounds: Bounds, worker: Sequence[str] = WORKER) -> dict[str, Any]:
    """Runs the worker and returns its result; for a worker that ended without one, how it ended.

    Args:
        request: the step.
        bounds: on time and memory.
        worker: the words of the worker's command, without its files.

    Returns:
        `status`: "compiled", or "refused", "too big", "failed", as the worker reports; "crashed", "out of time" and
        "out of host memory" if it did not. `reason` has details. A compiled one has what `worker.compile_step` returns.
    """
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        files = {name: pathlib.Path(folder) / name for name in ("request", "result", "output")}
        files["request"].write_bytes(pickle.dumps(request))
        with files["output"].open("wb") as output:
            process = subprocess.Popen(
                [*worker, str(files["request"]), str(files["result"])],
                env=_environment(os.environ, request.topology),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                ended = _wait(process, bounds)
            finally:
                process.kill()
                process.wait()
        if ended is not None:
            return {"status": ended[0], "reason": ended[1]}
        if files["result"].exists():
            return json.loads(files["result"].read_text(encoding="utf-8"))
        said = files["output"].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"status": "crashed", "reason": f"the compiling process ended with {how}: {said[-1] if said else ''}"}


def _environment(own: Mapping[str, str], topology: Topology) -> dict[str, str]:
    """Of the worker: ours, with what the topology needs, and no cached programs, which would take no time."""
    return {**own, **environment(topology), "JAX_ENABLE_COMPILATION_CACHE": "false"}


def _wait(process: subprocess.Popen, bounds: Bounds) -> tuple[str, str] | None:
    """Waits for the end of a process, or for the bound that it breaks, whose name and what happened it returns."""
    deadline = time.monotonic() + bounds.seconds
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > deadline:
            return "out of time", f"it did not end within {bounds.seconds:.0f} s; allow more with --plan_seconds"
        taken = _resident(process.pid)
        if taken > bounds.memory:
            return "out of host memory", (
                f"it took {taken / 2**30:.1f} GiB of this machine's memory, of at most {bounds.memory / 2**30:.1f}; "
                "allow more with --plan_memory"
            )


def _resident(process_id: int) -> int:
    """Resident memory of a process in bytes; 0 if the system does not report it."""
    try:
        pages = pathlib.Path(f"/proc/{process_id}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
