"""Table b: the same distillation step in PyTorch, eager and compiled, next to ours, in one process and in turn.

    python benchmarks/pytorch_step.py --shape=base --dtype=float32 --out=docs/results/performance

exports one teacher and one student from our parameters to Hugging Face folders, loads them in PyTorch (see
pytorch_distillation.py for what runs there) and, before anything is timed, checks that it is the same work: the losses
of the first two updates on the same batch agree to 1e-4 relative in float32 (2e-2 in bfloat16, in which both round
differently). Then times our whole step, eager, `torch.compile`, and the square products of both libraries. Expect
1 minute at tiny on two cores, and more at larger shapes, a good part of it compilation by PyTorch.
"""

import argparse
import os
import statistics
import tempfile
import time

import jax
import measuring
import numpy as np
import torch
import transformers
from measuring import Column, ceilings, interleave, machine, no_compilation, tell, timed_row
from programs import Training, positions
from pytorch_distillation import Distillation, matmul_runs
from shapes import OPTIMIZER, Shape, add_arguments, random_batch, random_teacher, settings_of, shape_of, title_of

from endistill_jax.checkpoints import huggingface
from endistill_jax.models.family import init_params
from endistill_jax.sharding import make_mesh
from endistill_jax.train.flops import step_flops

COLUMNS = (
    Column(key="name", title="What"),
    Column(key="median", title="Median (s)", kind="number"),
    Column(key="least", title="Least (s)", kind="number"),
    Column(key="gflops", title="Model GFLOP/s", kind="number"),
    Column(key="of_own_ceiling", title="Of its own library's ceiling", kind="share"),
    Column(key="tokens_per_second", title="Tokens/s", kind="count"),
    Column(key="times_ours", title="Times ours", kind="number"),
    Column(key="first_call", title="First call (s)", kind="number"),
)
OURS = "ours"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def torch_device() -> str:
    """PyTorch's name of the kind of device that JAX runs on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def build(shape: Shape, given: argparse.Namespace, folder: str) -> dict:
    """Our step and PyTorch's, all from the same parameters."""
    teacher, student = random_teacher(shape), jax.jit(init_params, static_argnums=0)(shape.student, jax.random.key(0))
    huggingface.save(f"{folder}/teacher", jax.tree.map(np.asarray, teacher), shape.teacher)
    huggingface.save(f"{folder}/student", jax.tree.map(np.asarray, student), shape.student)
    runs = {OURS: Training(shape, shape.objective, make_mesh(devices=jax.devices()[:1]), teacher, student)}
    for name in given.pytorch:
        runs[f"PyTorch {name}"] = Distillation(
            f"{folder}/teacher",
            f"{folder}/student",
            shape.objective,
            random_batch(shape),
            OPTIMIZER,
            dtype=given.dtype,
            device=torch_device(),
            attention=given.attention,
            compiled=name == "compiled",
        )
    return runs


def first_updates(runs: dict, count: int = 2) -> dict[str, float]:
    """Seconds of each one's first call, compilation included, after which `count` updates are done."""
    seconds = {}
    for name, run in runs.items():
        began = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - began
        for _ in range(count - 1):
            run()
    return seconds


def check_same_work(runs: dict, dtype: str) -> dict[str, list[float]]:
    """The losses of the first updates, if those of all agree.

    Raises:
        SystemExit: if they do not.
    """
    losses = {name: [float(loss) for loss in run.losses] for name, run in runs.items()}
    for name, found in losses.items():
        if not np.allclose(found, losses[OURS], rtol=TOLERANCE[dtype], atol=0):
            raise SystemExit(f"not the same work: the losses of {name} are {found}, ours {losses[OURS]}")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, shape="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="of transformers")
    parser.add_argument("--pytorch", nargs="*", default=["eager", "compiled"], help="which of its two forms")
    parser.add_argument("--out", help="folder for Markdown and JSON")
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for both libraries
    shape, facts = shape_of(given), machine()
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        steps = build(shape, given, folder)
    first = first_updates(steps)
    losses = check_same_work(steps, given.dtype)
    ours = measuring.matmul_runs([given.dtype])
    sizes = tuple(int(name.split()[-1]) for name in ours)
    theirs = matmul_runs([given.dtype], sizes, torch_device())
    runs = steps | ours | theirs
    for run in runs.values():
        run()
    with no_compilation():
        times = interleave(runs, given.rounds)

    ceiling = {OURS: ceilings(times)[given.dtype], "PyTorch": ceilings(times, "torch_matmul")[given.dtype]}
    flops = step_flops(shape.student, shape.teacher, shape.objective, shape.lengths).total
    reference = statistics.median(times[OURS])
    rows = []
    for name in steps:
        row = timed_row(name, times[name], flops, positions(shape.lengths))
        own = ceiling[OURS if name == OURS else "PyTorch"]
        row |= {"of_own_ceiling": 1e9 * row["gflops"] / own, "times_ours": row["median"] / reference}
        rows.append(row | {"first_call": first[name]})
    breaks = torch._dynamo.utils.counters["graph_break"]
    facts = {
        "losses of the first two updates": losses,
        "graph breaks of torch.compile": sum(breaks.values()),
        "ceiling GFLOP/s": {name: value / 1e9 for name, value in ceiling.items()},
        "shape": settings_of(given, shape),
        "machine": facts,
    }
    tell(given.out, f"pytorch_{given.shape}_{given.dtype}", title_of(given, shape), rows, COLUMNS, facts)


if __name__ == "__main__":
    main()
