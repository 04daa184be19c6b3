"""FLOPs of the matrix products in a compiled program, with the trip counts of loops.

Besides the model's own operations they include recomputation, work replicated on every chip, and operations added by
the compiler. A convolution counts only pairs that exist, as the TPU compiler turns batched products into strided
convolutions.
"""

import functools
import math
import re

import numpy as np

from endistill_jax.planning.hlo import Program
from endistill_jax.planning.instructions import Array, Instruction

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


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
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * math.prod(instruction.arrays[0].shape) * math.prod(left.shape[axis] for axis in axes)


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
    """What of a window decides which pairs exist: one number for each of its axes."""
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


@functools.cache
def _existing_pairs(
    inputs: int, kernel: int, output: int, *, stride: int, left_dilation: int, right_dilation: int, padding: int
) -> int:
    """Pairs of an output position and a kernel position that meet an element of the input, not padding or a gap."""
    position = stride * np.arange(output)[:, None] + right_dilation * np.arange(kernel) - padding
    inside = (position >= 0) & (position <= (inputs - 1) * left_dilation)
    return int(np.sum(inside & (position % left_dilation == 0)))
