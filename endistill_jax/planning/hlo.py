"""Parses the HLO text of a compiled program: its instructions, and how often each of them runs.

The body of a loop counts as often as its trip count, which XLA annotates (`known_trip_count`), or which follows from
the constant in its condition. So a scan over 24 layers counts 24 times.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

from endistill_jax.planning.instructions import Instruction, parse_instruction
from endistill_jax.planning.loops import count_turns

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
