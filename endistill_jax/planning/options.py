"""The flags of `--plan`: topologies, what a sweep varies, and limits. Imports nothing slow, for `--help`."""

import argparse
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

from endistill_jax.core.errors import UserError
from endistill_jax.planning.topologies import Topology, parse_topologies

FLAGS = ("--plan", "--topology", "--sweep", "--price", "--plan_dir", "--plan_seconds", "--plan_memory")
AXES = ("mesh", "batch", "remat", "teacher")
REMATS = ("full", "dots", "none")  # by memory, ascending
BATCHES = (128, 64, 32, 16, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to vary; None leaves an axis as the run has it, an empty tuple takes the usual choices.

    Attributes:
        mesh: sizes of data, fsdp and tensor.
        batch: examples a chip.
        remat: of the student.
        teacher: shardings of the teacher.
    """

    mesh: tuple[tuple[int, int, int], ...] | None = None
    batch: tuple[int, ...] | None = None
    remat: tuple[str, ...] | None = None
    teacher: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of one compilation on the planning host: seconds, and bytes of resident memory."""

    seconds: float = 1800.0
    memory: int = dataclasses.field(
        default_factory=lambda: int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Planning options of the command line.

    Attributes:
        sweep: what to vary; None plans the run as it is configured.
        price: of a chip-hour.
        folder: receives plan.md and plan.json, of a sweep sweep.md and sweep.json.
        bounds: on each compilation.
    """

    topologies: tuple[Topology, ...]
    sweep: Sweep | None = None
    price: float | None = None
    folder: str
    bounds: Bounds


def left_open(name: str) -> str:
    """In a plan, the value of a required macro that was not set."""
    return f"<{name}>"


def is_left_open(value: str) -> bool:
    return value.startswith("<") and value.endswith(">")


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planning")
    group.add_argument(
        "--plan",
        action="store_true",
        help="AOT-compile the training step for a topology, and report memory, traffic, time and cost; nothing "
        "that is only read or written when training needs to be given. For TPUs this needs the extra `plan`",
    )
    group.add_argument(
        "--topology",
        default="",
        metavar="A,B",
        help="where: v5e:4x4 or v5e-16, v6e, v5p, v4, 2*v5e:4x4 for two slices; h100:8, h200:1, gpu:8, cpu:8 by proxy",
    )
    group.add_argument(
        "--sweep",
        action="append",
        nargs="?",
        const="",
        metavar="AXIS[=A,B]",
        help="try mesh, batch (examples a chip), remat and teacher (its sharding), all or those named, and rank what "
        "fits; such as --sweep=batch=16,32 --sweep=mesh=1x16x1,4x4x1 --sweep=remat. Repeatable",
    )
    group.add_argument("--price", type=float, metavar="X", help="of one chip for one hour, in any currency")
    group.add_argument(
        "--plan_dir", metavar="FOLDER", help="receives the plan as Markdown and JSON; plans/<name of the gin file>"
    )
    group.add_argument("--plan_seconds", type=float, metavar="N", help="most time of one compilation; 1800")
    group.add_argument(
        "--plan_memory", type=float, metavar="GIB", help="most memory of it; nine tenths of this machine's"
    )


def plan_options(options: argparse.Namespace) -> PlanOptions:
    """The options of the parsed flags."""
    given = {"price": options.price, "plan_seconds": options.plan_seconds, "plan_memory": options.plan_memory}
    for name, value in given.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name} is {value:g}; it must be a number above 0")
    bounds = {} if options.plan_seconds is None else {"seconds": options.plan_seconds}
    if options.plan_memory is not None:
        bounds["memory"] = int(options.plan_memory * 2**30)
    return PlanOptions(
        topologies=parse_topologies(options.topology),
        sweep=None if options.sweep is None else parse_sweep(options.sweep),
        price=options.price,
        folder=options.plan_dir or f"plans/{pathlib.PurePath(options.gin_file[-1]).stem}",
        bounds=Bounds(**bounds),
    )


def parse_sweep(words: Sequence[str]) -> Sweep:
    """From `batch=16,32`, `mesh=1x16x1,4x4x1`, `remat`, ...; an empty word varies everything."""
    chosen: dict[str, tuple] = {}
    for word in words:
        axis, _, values = word.partition("=")
        if not word:
            chosen = dict.fromkeys(AXES, ()) | chosen
            continue
        if axis not in AXES:
            raise UserError(f"--sweep: there is no axis {axis!r}; choose among {', '.join(AXES)}")
        chosen[axis] = tuple(_parse_value(axis, value) for value in values.split(",") if value)
    return Sweep(**chosen)


def _parse_value(axis: str, value: str) -> int | str | tuple[int, ...]:
    from endistill_jax.sharding import PARAM_SHARDINGS

    allowed = {"remat": REMATS, "teacher": PARAM_SHARDINGS}.get(axis)
    if allowed:
        if value not in allowed:
            raise UserError(f"--sweep={axis}={value}: choose among {', '.join(allowed)}")
        return value
    sizes = value.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes) or len(sizes) != (3 if axis == "mesh" else 1):
        example = "mesh=1x16x1 (data x fsdp x tensor)" if axis == "mesh" else "batch=32 (examples a chip)"
        raise UserError(f"--sweep={axis}={value}: write it as {example}")
    return tuple(map(int, sizes)) if axis == "mesh" else int(value)
