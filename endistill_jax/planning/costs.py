"""What a compiled program costs one chip: FLOPs of its matrix products, and the traffic of its collectives.

Besides the model's own operations the FLOPs include recomputation, work replicated on every chip, and operations added
by the compiler.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from endistill_jax.planning.hlo import Array, Computation, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LISTED_GROUPS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{}]*)\))?\s*\{([^}]*)\}")
_DEVICE_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_AXIS = re.compile(r"'([^']+)'(?:=|:)?(?:\((\d+)\))?(\d+)?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_STARTS = "AsyncCollectiveStart"


def matmul_flops(program: Program) -> int:
    """Of one chip in one run of the program; 2 m k n for a product of [m, k] and [k, n]."""
    total = 0
    for instruction, computation, times in program.counted():
        if instruction.opcode not in ("dot", "convolution"):
            continue
        sides = [computation[name].arrays[0] for name in instruction.operands if name in computation]
        if len(sides) == 2:
            count = _dot_flops if instruction.opcode == "dot" else _convolution_flops
            total += times * count(instruction, *sides)
    return total


def _dot_flops(instruction: Instruction, left: Array, right: Array) -> int:
    contracted = _CONTRACTED.search(instruction.attributes)
    axes = _numbers(contracted[1]) if contracted else []
    return 2 * math.prod(instruction.arrays[0].shape) * math.prod(left.shape[axis] for axis in axes)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    of_left, of_right, of_output = _LABELS.search(instruction.attributes).groups()
    output = dict(zip(of_output, instruction.arrays[0].shape, strict=True))
    inputs, kernel = dict(zip(of_left, left.shape, strict=True)), dict(zip(of_right, right.shape, strict=True))
    window = _window(instruction.attributes)
    pairs = 1
    for index, axis in enumerate(sorted(set(of_output) - {"b", "f"})):
        settings = {name: values[index] for name, values in window.items()}
        pairs *= _existing_pairs(inputs[axis], kernel[axis], output[axis], **settings)
    return 2 * output["b"] * output["f"] * kernel["i"] * pairs


def _window(attributes: str) -> dict[str, list[int]]:
    """The settings of a window that decide which pairs exist, each with one number an axis."""
    found = _WINDOW.search(attributes)
    given = dict(part.split("=") for part in found[1].split()) if found else {}
    if "size" not in given:
        return {}
    axes = given["size"].count("x") + 1
    names = {"stride": "stride", "lhs_dilate": "left_dilation", "rhs_dilate": "right_dilation"}
    window = {
        ours: [int(number) for number in given[theirs].split("x")] if theirs in given else [1] * axes
        for theirs, ours in names.items()
    }
    low = [int(pad.split("_")[0]) for pad in given["pad"].split("x")] if "pad" in given else [0] * axes
    return window | {"padding": low}


# The TPU compiler turns batched products into strided convolutions, most of whose pairs do not exist.
@functools.cache
def _existing_pairs(
    inputs: int, kernel: int, output: int, *, stride: int, left_dilation: int, right_dilation: int, padding: int
) -> int:
    """Pairs of an output position and a kernel position that meet an element of the input, not padding or a gap."""
    position = stride * np.arange(output)[:, None] + right_dilation * np.arange(kernel) - padding
    inside = (position >= 0) & (position <= (inputs - 1) * left_dilation)
    return int(np.sum(inside & (position % left_dilation == 0)))


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
        payload = sum(computation[name].bytes for name in instruction.operands if name in computation)
        if kind == "all-gather":
            payload *= members
        entry = found.setdefault((kind, crosses), [0, 0, 0])
        for index, amount in enumerate((1, payload, _sent(kind, payload, members))):
            entry[index] += times * amount
    traffic = [
        Traffic(kind=kind, crosses_slices=crosses, count=count, payload=payload, sent=sent)
        for (kind, crosses), (count, payload, sent) in found.items()
    ]
    return sorted(traffic, key=lambda each: -each.sent)


def _sent(kind: str, payload: int, members: int) -> int:
    if kind in ("collective-permute", "collective-broadcast"):
        return payload
    once = payload * (members - 1) // members
    return 2 * once if kind == "all-reduce" else once


def _spread_channels(program: Program) -> set[str]:
    """Channels of the collectives that a TPU works on during several fusions: each of those names it once more."""
    return {
        _channel(instruction)
        for computation in program.computations.values()
        if _begins_here(computation)
        for instruction in computation.values()
        if instruction.opcode in KINDS
    } - {""}


def _begins_here(computation: Computation) -> bool:
    return any(each.opcode == "custom-call" and _STARTS in each.attributes for each in computation.values())


def _channel(instruction: Instruction) -> str:
    found = _CHANNEL.search(instruction.attributes)
    return found[1] if found else ""


def replica_groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """Which partitions exchange with each other; of a permutation, its pairs."""
    attributes = instruction.attributes
    if pairs := _PAIRS.search(attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if a != b]
    if mesh := _MESH_GROUPS.search(attributes):
        return _mesh_groups(*mesh.groups(""))
    if counted := _COUNTED_GROUPS.search(attributes):
        return _counted(counted[2], counted[3]).reshape(_numbers(counted[1])[0], -1).tolist()
    if listed := _LISTED_GROUPS.search(attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return groups or [list(range(partitions))]
    if "replica_groups=" in attributes:
        raise ValueError(f"{instruction.opcode} has groups that are written in an unknown way: {attributes[:200]}")
    return [list(range(partitions))]


def _counted(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in the given shape, its axes then in another order: of `[2,4]T(1,0)`."""
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else range(len(sizes)))


def _mesh_groups(mesh: str, device_ids: str, axes: str) -> list[list[int]]:
    """Groups over some axes of a mesh: `'a'=4,'b'=2` and `'a'`, or `'a':(2)2`, the inner 2 of the 4.

    Its devices are 0, 1, 2, ..., or those of `device_ids`: `[2,4]T(1,0)`, or one by one.
    """
    sizes = {name: int(size) for name, _, size in _MESH_AXIS.findall(mesh)}
    if order := _DEVICE_ORDER.search(device_ids):
        members = _counted(*order.groups())
    else:
        members = np.array(_numbers(device_ids) or range(math.prod(sizes.values())))
    shape, grouped = [], []
    cut = {name: (int(before or 1), int(size)) if size else None for name, before, size in _MESH_AXIS.findall(axes)}
    for name, size in sizes.items():
        before, inside = cut.get(name, (1, 1)) or (1, size)
        grouped.append(len(shape) + 1)
        shape += [before, inside, size // before // inside]
    members = np.moveaxis(members.reshape(shape), grouped, range(-len(grouped), 0))
    return members.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()
