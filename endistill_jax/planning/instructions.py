"""Parses single HLO instructions: opcode, operands, arrays and their sizes."""

import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
_BITS |= {"bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%?([\w.\-~]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """Type and shape of one array."""

    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        bits = _BITS.get(self.kind, 8 if self.kind.startswith("f8") else 32)
        return math.ceil(math.prod(self.shape) * bits / 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: what others call its result.
        opcode: such as "fusion".
        arrays: its result's; several if that is a tuple.
        operands: names of what it reads.
        arguments: the text between its parentheses.
        attributes: the text behind them.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def bytes(self) -> int:
        """Of all arrays of the result."""
        return sum(array.bytes for array in self.arrays)


def parse_instruction(name: str, text: str) -> Instruction:
    """Parses the text after `name =`: type, opcode, operands in parentheses, attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    arguments = text[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=text[end:opening].strip(),
        arrays=parse_arrays(text[:end]),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=text[closing + 1 :],
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays that a type names, such as `(f32[2,3]{1,0}, s32[])`."""
    return tuple(
        Array(kind=kind, shape=tuple(int(size.lstrip("<=")) for size in shape.split(",") if size))
        for kind, shape in _ARRAY.findall(text)
        if kind in _BITS or kind.startswith("f8")
    )
