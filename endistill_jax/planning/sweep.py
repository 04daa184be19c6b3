"""Sweeps mesh, batch, remat and teacher sharding, and keeps the largest batch that fits.

Batches are tried from the largest down, and the remat policy that keeps least first: what does not fit with it fits
with no other. So most variants that cannot fit are never compiled.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from endistill_jax.core.errors import UserError
from endistill_jax.planning.planned import PlannedStep
from endistill_jax.planning.request import StepRequest
from endistill_jax.planning.topologies import Topology
from endistill_jax.sharding import PLACEMENTS

AXES = ("mesh", "batch", "remat", "teacher")
REMATS = ("full", "dots", "none")  # by memory, ascending
BATCHES = (128, 64, 32, 16, 8)
DEFAULTS = {"batch": BATCHES, "remat": REMATS, "teacher": PLACEMENTS}


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


def parse_sweep(words: Sequence[str]) -> Sweep:
    """From `batch=16,32`, `mesh=1x16x1,4x4x1`, `remat`, ...; an empty word varies everything.

    Raises:
        UserError: an axis that does not exist, a value that is none of its.
    """
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
    allowed = {"remat": REMATS, "teacher": PLACEMENTS}.get(axis)
    if allowed:
        if value not in allowed:
            raise UserError(f"--sweep={axis}={value}: choose among {', '.join(allowed)}")
        return value
    sizes = value.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes) or len(sizes) != (3 if axis == "mesh" else 1):
        example = "mesh=1x16x1 (data x fsdp x tensor)" if axis == "mesh" else "batch=32 (examples a chip)"
        raise UserError(f"--sweep={axis}={value}: write it as {example}")
    return tuple(map(int, sizes)) if axis == "mesh" else int(value)


def usual_meshes(topology: Topology) -> tuple[tuple[int, int, int], ...]:
    """Parameters split over all chips of a slice, over a quarter of them, over four, over none; and heads over two."""
    chips = topology.chips // topology.slices
    parts = dict.fromkeys(part for part in (chips, chips // 4, 4, 1) if 1 <= part <= chips and chips % part == 0)
    meshes = [(topology.chips // part, part, 1) for part in parts]
    if chips >= 4:
        meshes.append((topology.slices, chips // 2, 2))
    return tuple(dict.fromkeys(meshes))


def run_sweep(sweep: Sweep, request: StepRequest, plan: Callable[[StepRequest], PlannedStep]) -> Iterator[PlannedStep]:
    """Plans the variants of a step, one after another; a variant that cannot fit any more is left out.

    Args:
        sweep: what varies.
        request: the step as configured, on one topology.
        plan: compiles one.
    """
    chips = request.topology.chips
    meshes = usual_meshes(request.topology) if sweep.mesh == () else sweep.mesh or (request.mesh,)
    teacher_shardings = _choices(sweep.teacher, "teacher", request.teacher_sharding)
    remats = sorted(_choices(sweep.remat, "remat", request.student.remat), key=REMATS.index)
    batches = [request.lengths.batch]
    if sweep.batch is not None:
        batches = sorted({chips * each for each in sweep.batch or BATCHES}, reverse=True)
    for mesh, teacher_sharding in itertools.product(meshes, teacher_shardings):
        if teacher_sharding != teacher_shardings[0] and (request.teacher is None or mesh[1] == 1):
            continue  # nothing is sharded over one device: both are the same
        possible = batches
        for remat in remats:
            for batch in possible:
                planned = plan(
                    dataclasses.replace(
                        request,
                        mesh=mesh,
                        teacher_sharding=teacher_sharding,
                        student=dataclasses.replace(request.student, remat=remat),
                        lengths=request.lengths._replace(batch=batch),
                    )
                )
                yield planned
                if planned.fits:
                    break
                if planned.status == "too big":
                    possible = [other for other in possible if other < batch]


def _choices(given: tuple | None, axis: str, configured: str) -> tuple:
    if given is None:
        return (configured,)
    return given or DEFAULTS[axis]
