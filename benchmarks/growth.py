"""Table e: how the cost of a distillation step grows with batch, length, depth and devices.

    python benchmarks/growth.py --shape=tiny --out=docs/results/performance
    python benchmarks/growth.py --shape=tiny --axes=depth --factors=1,2,4,8

runs the whole step at the shape's own size times each factor, one axis at a time, the points of an axis in turn. Depth
multiplies the layers of both stacks of both models, once with layers in a compiled loop and once unrolled. Devices are
forced host devices, each number in processes of its own that take turns, with one batch over all of them: on one
machine they share its cores, so this shows what splitting costs, not what more chips gain. Times of a token that stay
as they are mean linear growth. Expect some minutes at tiny on two cores.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys

from measuring import Column, interleave, machine, no_compilation, tell, timed_row
from programs import Program, positions, whole_step
from shapes import Shape, add_arguments, settings_of, shape_of

from endistill_jax.sharding import make_mesh

COLUMNS = (
    Column(key="axis", title="Axis"),
    Column(key="name", title="Size"),
    Column(key="median", title="Step, median (s)", kind="number"),
    Column(key="microseconds", title="Per token (µs)", kind="number"),
    Column(key="gflops", title="Model GFLOP/s", kind="number"),
    Column(key="trace_seconds", title="Tracing (s)", kind="number"),
    Column(key="compile_seconds", title="Compilation (s)", kind="number"),
    Column(key="temporary_mib", title="Temporaries (MiB)", kind="number"),
)
AXES = ("batch", "length", "depth", "devices")


def deeper(shape: Shape, factor: int, loop: bool) -> Shape:
    """Both stacks of both models, so many times as deep."""

    def of(config):
        depths = {name: factor * getattr(config, name) for name in ("num_encoder_layers", "num_decoder_layers")}
        return dataclasses.replace(config, scan_layers=loop, **depths)

    return dataclasses.replace(shape, teacher=of(shape.teacher), student=of(shape.student))


def points(shape: Shape, axis: str, factors: list[int]) -> dict[str, Shape]:
    """Size as text -> the shape at it."""
    found = {}
    for factor in factors:
        batch, source, target = shape.lengths
        match axis:
            case "batch":
                lengths = shape.lengths._replace(batch=factor * batch)
                found[f"{lengths.batch} examples"] = dataclasses.replace(shape, lengths=lengths)
            case "length":
                lengths = shape.lengths._replace(source=factor * source, target=factor * target)
                found[f"{lengths.source}/{lengths.target}"] = dataclasses.replace(shape, lengths=lengths)
            case "depth":
                for loop in (True, False):
                    grown = deeper(shape, factor, loop)
                    depths = "/".join(str(model.num_encoder_layers) for model in (grown.teacher, grown.student))
                    found[f"{depths} layers, {'loop' if loop else 'unrolled'}"] = grown
    return found


def row_of(axis: str, size: str, program: Program, seconds: list[float], tokens: int) -> dict:
    """A row of the table."""
    return timed_row(size, seconds, program.flops, tokens) | {
        "axis": axis,
        "flops": program.flops,
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
        "temporary_mib": program.temporary_bytes / 2**20,
    }


def measure_axis(shape: Shape, axis: str, factors: list[int], rounds: int) -> list[dict]:
    """The rows of batch, length or depth."""
    shapes = points(shape, axis, factors)
    programs = {size: whole_step(grown) for size, grown in shapes.items()}
    runs = {size: program.run for size, program in programs.items()}
    for run in runs.values():
        run()
    with no_compilation():
        times = interleave(runs, rounds)
    return [row_of(axis, size, programs[size], times[size], positions(shapes[size].lengths)) for size in shapes]


def measure_here(shape: Shape, rounds: int) -> dict:
    """The row of this process's devices."""
    mesh = make_mesh()
    program = whole_step(shape, mesh)
    program.run()
    with no_compilation():
        times = interleave({"step": program.run}, rounds)
    return row_of("devices", f"{mesh.size} devices", program, times["step"], positions(shape.lengths))


def measure_devices(counts: list[int], tokens: int, rounds: int, passes: int = 3) -> list[dict]:
    """The rows of devices: a process for each number, in turn, some times over."""
    merged: dict[int, dict] = {}
    for _ in range(passes):
        for count in counts:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
            command = [sys.executable, *sys.argv, "--here", f"--rounds={-(-rounds // passes)}"]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            ended = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(ended.stdout.splitlines()[-1])
            merged.setdefault(count, row | {"seconds": []})["seconds"] += row["seconds"]
    return [row | timed_row(row["name"], row["seconds"], row["flops"], tokens) for row in merged.values()]


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, shape="tiny")
    parser.add_argument("--axes", type=lambda text: text.split(","), default=AXES)
    parser.add_argument("--factors", type=numbers, default=[1, 2, 4], help="of batch, length and depth")
    parser.add_argument("--devices", type=numbers, default=[1, 2, 4], help="numbers of forced host devices")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="folder for Markdown and JSON")
    given = parser.parse_args()
    shape = shape_of(given)
    if given.here:
        print(json.dumps(measure_here(shape, given.rounds)))
        return
    facts, rows = machine(), []
    for axis in given.axes:
        if axis == "devices":
            rows += measure_devices(given.devices, positions(shape.lengths), given.rounds)
        else:
            rows += measure_axis(shape, axis, given.factors, given.rounds)
    facts = {"shape": settings_of(given, shape), "machine": facts}
    title = f"Growth of the whole step: {given.shape}, {given.dtype}"
    tell(given.out, f"growth_{given.shape}_{given.dtype}", title, rows, COLUMNS, facts)


if __name__ == "__main__":
    main()
