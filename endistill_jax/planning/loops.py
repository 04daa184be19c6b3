"""Trip counts of loops in a compiled program, derived from the counter if the compiler does not annotate them.

A counter has an initial value, an increment per iteration (2 if the compiler unrolled the loop once) and the constant
that the loop's condition compares it with. All three may be behind copies and inside fusions.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from endistill_jax.planning.instructions import Instruction

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
