"""Parses the HLO text of a compiled program: its instructions, and how often each of them runs.

The body of a loop counts as often as its trip count, so a scan over 24 layers counts 24 times. XLA annotates trip
counts (`known_trip_count`); otherwise they are derived from the loop's counter: its initial value, its increment per
iteration (2 if the compiler unrolled the loop once) and the constant that the condition compares it with. All three may
be behind copies and inside fusions.
"""

import collections
import dataclasses
import graphlib
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_BITS |= {f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%?([\w.\-~]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-~]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-~]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
# Their computations are applied to pairs of elements; they are no calls.
_APPLIES_BY_ELEMENT = ("all-reduce", "reduce", "sort", "map", "scatter", "select-and-scatter")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LOOP_PARTS = re.compile(r"\b(condition|body)=%?([\w.\-~]+)")
_FUSED = re.compile(r"\bcalls=%?([\w.\-~]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_COPIES = ("copy", "bitcast", "convert", "reshape")


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
        opcode: such as "fusion".
        arrays: its result's; several if that is a tuple.
        operands: names of what it reads.
        arguments: the text between its parentheses.
        attributes: the text behind them.
    """

    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def bytes(self) -> int:
        """Of all arrays of the result."""
        return sum(array.bytes for array in self.arrays)


Computation = Mapping[str, Instruction]  # by name, in order; the last is the result


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: where it begins.
    """

    computations: Mapping[str, Computation]
    entry: str

    def counted(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that runs, with its computation and how often it runs; of a branch, both sides run."""
        # graphlib yields what is called before its callers.
        called = {name: self._calls(computation) for name, computation in self.computations.items()}
        counts: dict[str, int] = collections.defaultdict(int, {self.entry: 1})
        for caller in reversed([*graphlib.TopologicalSorter(called).static_order()]):
            for name, times in called[caller].items():
                counts[name] += counts[caller] * times
        for name, computation in self.computations.items():
            if counts[name]:
                for instruction in computation.values():
                    yield instruction, computation, counts[name]

    def uncounted_loops(self) -> int:
        """Number of loops with unknown trip count, whose bodies count once."""
        return sum(
            instruction.opcode == "while" and _trip_count(instruction, computation, self.computations) is None
            for instruction, computation, _ in self.counted()
        )

    def _calls(self, computation: Computation) -> dict[str, int]:
        """How often a computation calls others."""
        calls: dict[str, int] = collections.defaultdict(int)
        for instruction in computation.values():
            opcode, attributes = instruction.opcode, instruction.attributes
            if opcode in _APPLIES_BY_ELEMENT or opcode.endswith(("-update", "-done")):
                continue  # an asynchronous call counts where it starts
            names = _CALLED.findall(attributes)
            for listed in _CALLED_LISTS.findall(attributes):
                names += _NAME.findall(listed)
            times = (_trip_count(instruction, computation, self.computations) or 1) if opcode == "while" else 1
            for name in {*names} & self.computations.keys():
                calls[name] += times
        return calls


def parse_program(text: str) -> Program:
    """Parses the text that `compiled.as_text()` gives."""
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
            current[found[2]] = _parse_instruction(found[3])
            root = found[2] if found[1] else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return Program(computations=computations, entry=entry)


def _parse_instruction(text: str) -> Instruction:
    """Parses the text after `name =`: type, opcode, operands in parentheses, attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    arguments = text[opening + 1 : closing]
    return Instruction(
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


def _trip_count(loop: Instruction, owner: Computation, computations: Mapping[str, Computation]) -> int | None:
    """Trip count of a `while` in `owner`: as annotated, else from its counter; None if neither is known."""
    if noted := _TRIP_COUNT.search(loop.attributes):
        return int(noted[1])
    parts = dict(_LOOP_PARTS.findall(loop.attributes))
    compared = _result(computations, parts["condition"])
    if compared.opcode != "compare" or "direction=LT" not in compared.instruction.attributes:
        return None
    counter, bound = compared.operand(0), compared.operand(1).constant
    index = _INDEX.search(counter.instruction.attributes)  # of the counter, in the tuple that the loop carries
    if bound is None or index is None:
        return None
    start = _Value(computations, owner, loop.operands[0]).origin().element(int(index[1])).constant
    added = _result(computations, parts["body"]).element(int(index[1]))
    steps = [added.operand(0).constant, added.operand(1).constant] if added.opcode == "add" else []
    step = next(filter(None, steps), None)
    return None if start is None or step is None else math.ceil((bound - start) / step)


def _result(computations: Mapping[str, Computation], name: str, caller: "_Value | None" = None) -> "_Value":
    computation = computations[name]
    return _Value(computations, computation, next(reversed(computation)), caller).origin()


@dataclasses.dataclass(frozen=True)
class _Value:
    """What an instruction of a computation gives; the caller is the fusion that the computation is the inside of."""

    computations: Mapping[str, Computation]
    computation: Computation
    name: str
    caller: "_Value | None" = None

    @property
    def instruction(self) -> Instruction:
        return self.computation[self.name]

    @property
    def opcode(self) -> str:
        return self.instruction.opcode

    @property
    def constant(self) -> int | None:
        """Its value, if it is a whole number in the program's text."""
        text = self.instruction.arguments
        return int(text) if self.opcode == "constant" and text.lstrip("-").isdecimal() else None

    def operand(self, index: int) -> "_Value":
        return dataclasses.replace(self, name=self.instruction.operands[index]).origin()

    def element(self, index: int) -> "_Value":
        """An element of a tuple."""
        return self.operand(index) if self.opcode == "tuple" else self

    def origin(self) -> "_Value":
        """Where a value was computed: behind copies, inside fusions and outside of them."""
        if self.opcode in _COPIES:
            return self.operand(0)
        if self.opcode == "fusion" and (fused := _FUSED.search(self.instruction.attributes)):
            return _result(self.computations, fused[1], caller=self)
        if self.opcode == "parameter" and self.caller is not None:
            return self.caller.operand(int(self.instruction.arguments))
        return self
