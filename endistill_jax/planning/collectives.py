"""What the chips of a compiled program exchange: collectives by kind, how often they run and how much they move."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from endistill_jax.planning.hlo import Program
from endistill_jax.planning.instructions import Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{}]*)\))?\s*\{([^}]*)\}")
_DEVICE_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_AXIS = re.compile(r"'([^']+)'(?:=|:)?(?:\((\d+)\))?(\d+)?")
_STARTS = "AsyncCollectiveStart"
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind over one network, of one chip in one step.

    Attributes:
        kind: such as "all-gather".
        crosses_slices: whether some go over the network between slices.
        count: how often such an instruction runs.
        payload: bytes of the whole of what is gathered, reduced or exchanged, the larger of input and output.
        sent: bytes that a chip sends in the ring form: (n - 1) / n of the payload, twice that to reduce it for all.
    """

    kind: str
    crosses_slices: bool
    count: int
    payload: int
    sent: int


def read_collectives(program: Program, slice_of: Sequence[int]) -> list[Traffic]:
    """The traffic of a program, one entry a kind and network, most bytes first.

    Args:
        program: as compiled for one of the chips.
        slice_of: the slice that each of the program's partitions is in.
    """
    found: dict[tuple[str, bool], list[int]] = {}
    spread = _spread_channels(program)
    for instruction, computation, times in program.counted():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or (_channel(instruction) in spread and not _begins_here(computation)):
            continue
        groups = replica_groups(instruction, len(slice_of))
        members = max(map(len, groups), default=1)
        if members < 2:
            continue
        crosses = any(len({slice_of[member] for member in group}) > 1 for group in groups)
        payload = _payload(kind, _operand_bytes(instruction, computation), members)
        entry = found.setdefault((kind, crosses), [0, 0, 0])
        for index, amount in enumerate((1, payload, _sent(kind, payload, members))):
            entry[index] += times * amount
    traffic = [
        Traffic(kind=kind, crosses_slices=crosses, count=count, payload=payload, sent=sent)
        for (kind, crosses), (count, payload, sent) in found.items()
    ]
    return sorted(traffic, key=lambda each: -each.sent)


def _spread_channels(program: Program) -> set[str]:
    """Channels of the collectives that a TPU works on during several fusions: each of those names it once more."""
    return {
        _channel(instruction)
        for computation in program.computations.values()
        if _begins_here(computation)
        for instruction in computation.values()
        if instruction.opcode in KINDS
    } - {""}


def _begins_here(computation: dict[str, Instruction]) -> bool:
    return any(each.opcode == "custom-call" and _STARTS in each.attributes for each in computation.values())


def _channel(instruction: Instruction) -> str:
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found[1] if found else ""


def replica_groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """Which partitions exchange with each other; of a permutation, its pairs."""
    attributes = instruction.attributes
    if pairs := _PAIRS.search(attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if a != b]
    if mesh := _MESH_GROUPS.search(attributes):
        return _mesh_groups(*mesh.groups(""))
    if counted := _COUNTED_GROUPS.search(attributes):
        shape, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in counted.groups())
        return _counted(sizes, order).reshape(shape[0], -1).tolist()
    if listed := _LISTED_GROUPS.search(attributes):
        groups = [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return groups or [list(range(partitions))]
    if "replica_groups=" in attributes:
        raise ValueError(f"{instruction.opcode} has groups that are written in an unknown way: {attributes[:200]}")
    return [list(range(partitions))]


def _counted(sizes: list[int], order: list[int] | None) -> np.ndarray:
    """0, 1, 2, ... in the given shape, its axes then in another order."""
    members = np.arange(math.prod(sizes)).reshape(sizes)
    return members.transpose(order or range(len(sizes)))


def _mesh_groups(mesh: str, device_ids: str, axes: str) -> list[list[int]]:
    """Groups over some axes of a mesh: `'a'=4,'b'=2` and `'a'`, or `'a':(2)2`, the inner 2 of the 4.

    Its devices are 0, 1, 2, ..., or those of `device_ids`: `[2,4]T(1,0)`, or one by one.
    """
    sizes = {name: int(size) for name, _, size in _MESH_AXIS.findall(mesh)}
    members = np.arange(math.prod(sizes.values()))
    if order := _DEVICE_ORDER.search(device_ids):
        members = _counted(*([int(n) for n in part.split(",")] if part else None for part in order.groups()))
    elif device_ids:
        members = np.array([int(n) for n in device_ids.split(",")])
    shape, grouped = [], []
    cut = {name: (int(before or 1), int(size)) if size else None for name, before, size in _MESH_AXIS.findall(axes)}
    for name, size in sizes.items():
        before, inside = cut.get(name, (1, 1)) or (1, size)
        grouped.append(len(shape) + 1)
        shape += [before, inside, size // before // inside]
    members = np.moveaxis(members.reshape(shape), grouped, range(-len(grouped), 0))
    return members.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


def _operand_bytes(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    return sum(computation[name].bytes for name in instruction.operands if name in computation)


def _payload(kind: str, operand: int, members: int) -> int:
    return operand * members if kind == "all-gather" else operand


def _sent(kind: str, payload: int, members: int) -> int:
    if kind in ("collective-permute", "collective-broadcast"):
        return payload
    once = payload * (members - 1) // members
    return 2 * once if kind == "all-reduce" else once
