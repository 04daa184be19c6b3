"""Parses the HLO text of a compiled program: its instructions, and how often each of them runs.

The body of a loop counts as often as its trip count, which XLA annotates (`known_trip_count`), or which follows from
the constant in its condition. So a scan over 24 layers counts 24 times.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

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


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-~]+) = (.*)$")
_NAME = re.compile(r"%?([\w.\-~]+)")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-~]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
# Their computations are applied to pairs of elements; they are no calls.
_APPLIES_BY_ELEMENT = ("all-reduce", "reduce", "sort", "map", "scatter", "select-and-scatter")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: name -> instructions by name.
        entry: where it begins.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def executions(self) -> dict[str, int]:
        """How often each computation runs in one run of the program; of a branch, every side counts as taken."""
        counts: dict[str, int] = collections.defaultdict(int)
        counts[self.entry] = 1
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                for called, times in self._calls(instruction):
                    counts[called] += counts[name] * times
        return dict(counts)

    def counted(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Every instruction that runs, with its computation and how often."""
        counts = self.executions()
        for name, instructions in self.computations.items():
            if counts.get(name):
                for instruction in instructions.values():
                    yield instruction, instructions, counts[name]

    def _calls(self, instruction: Instruction) -> list[tuple[str, int]]:
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode in _APPLIES_BY_ELEMENT or opcode.endswith(("-update", "-done")):
            return []  # an asynchronous call counts where it starts
        names = _CALLED.findall(attributes)
        for listed in _CALLED_LISTS.findall(attributes):
            names += _NAME.findall(listed)
        times = self.trip_count(instruction) if opcode == "while" else 1
        return [(name, times) for name in dict.fromkeys(names) if name in self.computations]

    def trip_count(self, loop: Instruction) -> int:
        """Trip count of a `while`; 1 if unknown, see `uncounted_loops`."""
        return self._turns(loop) or 1

    def uncounted_loops(self) -> int:
        """Number of loops with unknown trip count, whose bodies count once."""
        return sum(each.opcode == "while" and self._turns(each) is None for each, _, _ in self.counted())

    def _turns(self, loop: Instruction) -> int | None:
        owner = next(each for each in self.computations.values() if each.get(loop.name) is loop)
        return count_turns(loop, owner, self.computations)

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen = {self.entry}
        pending = [(self.entry, iter(self._called_by(self.entry)))]
        while pending:  # depth first, without recursion: programs are deep
            name, rest = pending[-1]
            called = next((other for other in rest if other not in seen), None)
            if called is None:
                order.append(name)
                pending.pop()
            else:
                seen.add(called)
                pending.append((called, iter(self._called_by(called))))
        return order[::-1]

    def _called_by(self, name: str) -> list[str]:
        return [called for each in self.computations[name].values() for called, _ in self._calls(each)]


def parse_program(text: str) -> Program:
    """Reads what `compiled.as_text()` gives.

    Raises:
        ValueError: if there is no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, root = None, None, ""
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            if root in current:
                current[root] = current.pop(root)  # the root of a computation is its last entry
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = parse_instruction(found[2], found[3])
            root = found[2] if found[1] else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return Program(computations=computations, entry=entry)


Computation = Mapping[str, Instruction]
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PARTS = re.compile(r"\b(condition|body)=%?([\w.\-~]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-~]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_COPIES = ("copy", "bitcast", "convert", "reshape")


@dataclasses.dataclass(frozen=True)
class _Value:
    """A name in a computation, and the fusion that the computation was entered by."""

    computation: Computation
    name: str = ""
    caller: "_Value | None" = None

    @property
    def instruction(self) -> Instruction:
        return self.computation[self.name]

    @property
    def opcode(self) -> str:
        return self.instruction.opcode

    @property
    def constant(self) -> int | None:
        """Its value, if it is a whole number that the program holds."""
        text = self.instruction.arguments
        return int(text) if self.opcode == "constant" and text.lstrip("-").isdecimal() else None


def count_turns(loop: Instruction, owner: Computation, computations: Mapping[str, Computation]) -> int | None:
    """Trip count of a `while`: as annotated, else from its counter; None if neither is known.

    Args:
        loop: the instruction.
        owner: the computation that it is in.
        computations: all of the program.
    """
    if noted := _TRIP_COUNT.search(loop.attributes):
        return int(noted[1])
    parts = dict(_PARTS.findall(loop.attributes))
    if not {*parts.values()} <= {*computations} or len(parts) != 2:
        return None
    values = _Values(computations)
    compared = values.result(_Value(computations[parts["condition"]]))
    if compared.opcode != "compare" or "direction=LT" not in compared.instruction.attributes:
        return None
    counter, bound = (values.operand(compared, index) for index in (0, 1))
    index = _INDEX.search(counter.instruction.attributes)
    if bound.constant is None or index is None:
        return None
    begin = values.element(values.resolve(_Value(owner, loop.operands[0])), int(index[1]))
    added = values.element(values.result(_Value(computations[parts["body"]])), int(index[1]))
    steps = [values.operand(added, operand).constant for operand in (0, 1)] if added.opcode == "add" else []
    step = next((each for each in steps if each), None)
    if begin.constant is None or step is None:
        return None
    return math.ceil((bound.constant - begin.constant) / step)


@dataclasses.dataclass(frozen=True)
class _Values:
    """Traces values to their origin."""

    computations: Mapping[str, Computation]

    def element(self, made: _Value, place: int) -> _Value:
        """An element of a tuple."""
        return self.operand(made, place) if made.opcode == "tuple" else made

    def operand(self, value: _Value, index: int) -> _Value:
        return self.resolve(dataclasses.replace(value, name=value.instruction.operands[index]))

    def result(self, value: _Value) -> _Value:
        """What the computation of `value` returns: its last instruction."""
        return self.resolve(dataclasses.replace(value, name=next(reversed(value.computation))))

    def resolve(self, value: _Value) -> _Value:
        """Follows copies, and goes into and out of fusions, to what a value really is."""
        instruction = value.instruction
        if instruction.opcode in _COPIES:
            return self.operand(value, 0)
        if instruction.opcode == "fusion" and (called := _FUSED.search(instruction.attributes)):
            return self.result(_Value(self.computations[called[1]], caller=value))
        if instruction.opcode == "parameter" and value.caller is not None:
            return self.operand(value.caller, int(instruction.arguments))
        return value
