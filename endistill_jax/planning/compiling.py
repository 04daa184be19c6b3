"""Compiles a step in a process of its own, with limits on time and memory.

The process is `python -m endistill_jax.planning.compiling REQUEST RESULT`: it reads a pickled `StepRequest` and writes
what was found as JSON. AOT compilers can crash the process, or exhaust its memory.
"""

import importlib.util
import json
import math
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.planning.costs import matmul_flops, read_collectives
from endistill_jax.planning.hlo import parse_program
from endistill_jax.planning.options import Bounds
from endistill_jax.planning.planned import StepRequest
from endistill_jax.planning.topologies import Topology, devices, environment
from endistill_jax.sharding import batch_sharding, check_rows, make_mesh, param_shardings
from endistill_jax.train.optimizer import make_optimizer
from endistill_jax.train.state import abstract_state, state_shardings
from endistill_jax.train.step import make_train_step

WORKER = (sys.executable, "-m", "endistill_jax.planning.compiling")
# Polling interval of a running compilation's memory.
_POLL_SECONDS = 0.2
_TOKENS = {"encoder": ("input_tokens",), "decoder": ("input_tokens", "target_tokens", "loss_weights")}
_PACKED = ("segment_ids", "positions")


def check_compilers(topologies: Sequence[Topology]) -> None:
    """Checks that the TPU compiler is installed where it is needed."""
    for topology in topologies:
        if not topology.is_proxy and importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"compiling for {topology.name} needs libtpu, which is not installed; "
                "install the extra `plan`: pip install 'endistill-jax[plan]'"
            )


def compile_bounded(request: StepRequest, bounds: Bounds, worker: Sequence[str] = WORKER) -> dict[str, Any]:
    """Compiles a step in a process of its own; if that ended without a result, returns how it ended.

    Args:
        request: the step.
        bounds: on time and memory.
        worker: the command of the process, without its files.

    Returns:
        `status`: "compiled", or "refused", "too big", "failed", as the process reports; "crashed", "out of time" and
        "out of host memory" if it did not. `reason` has details. A compiled one has what `compile_step` returns.
    """
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        request_file, result_file, output_file = (
            pathlib.Path(folder, name) for name in ("request", "result", "output")
        )
        request_file.write_bytes(pickle.dumps(request))
        with output_file.open("wb") as output:
            process = subprocess.Popen(
                [*worker, str(request_file), str(result_file)],
                # A cached program would compile in no time and with no memory.
                env={**os.environ, **environment(request.topology), "JAX_ENABLE_COMPILATION_CACHE": "false"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                broken = _wait(process, bounds)
            finally:
                process.kill()
                process.wait()
        if broken is not None:
            return {"status": broken[0], "reason": broken[1]}
        if result_file.exists():
            return json.loads(result_file.read_text(encoding="utf-8"))
        said = output_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"status": "crashed", "reason": f"the compiling process ended with {how}: {said[-1] if said else ''}"}


def _wait(process: subprocess.Popen, bounds: Bounds) -> tuple[str, str] | None:
    """Waits until a process ends, or breaks a bound: then returns its status and the reason."""
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


def compile_step(request: StepRequest) -> dict[str, Any]:
    """Compiles the step in this process, which has the topology's devices, and measures it for one device and one step.

    Returns:
        `mesh`, sizes by axis; `student_params` and `teacher_params`, numbers; in bytes `held`, what is kept between
        steps by owner and shapes, and `memory`, what the compiler plans; `flops` of matrix products; `collectives`,
        fields of `Traffic`; `uncounted_loops`, with unknown trip counts; `trace_seconds` and `compile_seconds`.

    Raises:
        UserError: settings that do not fit each other or the topology.
        jax.errors.JaxRuntimeError: what the compiler says, such as that memory does not suffice.
    """
    mesh = make_mesh(*request.mesh, devices=devices(request.topology), slices=request.slices)
    check_rows("Data.batch_size", request.lengths.batch, mesh, request.micro_batches)
    if request.eval_rows is not None:
        check_rows("Data.eval_batch_size", request.eval_rows, mesh)
    optimizer = make_optimizer(request.optimizer, request.steps)
    step = make_train_step(
        student=request.student,
        teacher=request.teacher,
        objective=request.objective,
        optimizer=optimizer,
        mesh=mesh,
        micro_batches=request.micro_batches,
        base_key=jax.random.key(0),
        implementation=request.implementation,
        teacher_sharding=request.teacher_sharding,
        compiler_options=request.compiler_options,
    )
    state, teacher_params, batch = _arguments(request, optimizer, mesh)
    began = time.monotonic()
    lowered = step.lower(state, teacher_params, batch)
    lowered_after = time.monotonic() - began
    compiled = lowered.compile()
    compiled_after = time.monotonic() - began
    memory = compiled.memory_analysis()
    program = parse_program(compiled.as_text())
    traffic = read_collectives(program, [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat])
    return {
        "mesh": dict(mesh.shape),
        "student_params": count_params(state.params),
        "teacher_params": count_params(teacher_params),
        "held": {
            "student": _bytes_a_device(state.params),
            "optimizer": _bytes_a_device((state.step, state.opt_state)),
            "objective": _bytes_a_device(state.objective),
            "teacher": _bytes_a_device(teacher_params),
            "batch": _bytes_a_device(batch),
        },
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliases": memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "flops": matmul_flops(program),
        "uncounted_loops": program.uncounted_loops(),
        "collectives": [vars(each) for each in traffic],
        "trace_seconds": lowered_after,
        "compile_seconds": compiled_after,
    }


def _arguments(request: StepRequest, optimizer: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """Shapes and shardings of the step's arguments: the state, the teacher's parameters or None, and the batch."""

    def sharded(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )

    student, teacher, objective = request.student, request.teacher, request.objective
    state = sharded(
        abstract_state(student, optimizer, objective, teacher),
        state_shardings(student, optimizer, mesh, objective, teacher),
    )
    teacher_params = None
    if teacher is not None:
        params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(teacher.dtype)), abstract_params(teacher))
        teacher_params = sharded(params, param_shardings(teacher, mesh, request.teacher_sharding))
    rows, *lengths = request.lengths
    batch = {
        f"{side}_{name}": jax.ShapeDtypeStruct((rows, length), np.int32, sharding=batch_sharding(mesh))
        for (side, names), length in zip(_TOKENS.items(), lengths, strict=True)
        for name in (*names, *(_PACKED if request.packed else ()))
    }
    return state, teacher_params, batch


def _bytes_a_device(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def main(request_file: str, result_file: str) -> None:
    """Handles one request; errors of settings or compiler are results too."""
    request = pickle.loads(pathlib.Path(request_file).read_bytes())
    try:
        result = compile_step(request) | {"status": "compiled", "reason": ""}
    except UserError as error:
        result = {"status": "refused", "reason": str(error)}
    except jax.errors.JaxRuntimeError as error:
        full = "RESOURCE_EXHAUSTED" in str(error)
        result = {"status": "too big" if full else "failed", "reason": str(error)}
    result["host_memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pathlib.Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
