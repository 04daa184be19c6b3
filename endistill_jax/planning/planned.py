"""A training step to compile, the result of its compilation, and the estimates of time and cost from it.

    computing    operations of a chip / (peak x utilization)
    exchanging   bytes that a chip sends / (its bandwidth x the share of it that is used)
    reading      bytes of the step's arguments / bandwidth of the chip's memory: each of them once
    least time   the longest of the three, each at its best: all exchange hidden behind computation
    most time    the sum of the first two, each at its worst: none hidden

Nothing here was measured on such chips; the assumptions are stated with every estimate.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from endistill_jax.checkpoints.manifest import plain
from endistill_jax.core.model_io import Lengths
from endistill_jax.models.family import ModelConfig
from endistill_jax.objectives import LossImplementation, Objective
from endistill_jax.planning.topologies import Chip, Topology
from endistill_jax.train.flops import step_flops
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.step import CompilerOptions

DAY = 86400.0
_USED_BY_COMPILER = re.compile(r"Used [\d.]+\w? of [\d.]+\w? hbm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRequest:
    """A training step on a topology: everything it depends on, as picklable data.

    Attributes:
        teacher: None if the objective needs none.
        steps: updates of the run.
        lengths: size of the global batch.
        eval_rows: of an evaluation's batch, which the mesh must spread too; None where there is none.
        packed: whether the batch has segment ids and positions.
        mesh: sizes of the axes data, fsdp and tensor; -1 takes what the others leave.
        micro_batches: parts of a batch whose gradients are accumulated.
        compiler_options: of XLA, by platform.
        slices: as in `make_mesh`.
    """

    topology: Topology
    student: ModelConfig
    teacher: ModelConfig | None
    objective: Objective
    optimizer: OptimizerConfig
    steps: int
    lengths: Lengths
    eval_rows: int | None = None
    packed: bool = True
    mesh: tuple[int, int, int] = (-1, 1, 1)
    micro_batches: int = 1
    implementation: LossImplementation = LossImplementation()
    teacher_sharding: str = "sharded"
    compiler_options: CompilerOptions | None = None
    slices: int | None = None

    @property
    def tokens(self) -> int:
        """Positions of a step's batch, both sides, padding included."""
        return self.lengths.batch * (self.lengths.source + self.lengths.target)

    @property
    def batch_per_chip(self) -> float:
        """Examples of the global batch a chip."""
        return self.lengths.batch / self.topology.chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions of an estimate, as shares of the published peaks.

    Attributes:
        best_utilisation: of the matrix units, where all goes well.
        worst_utilisation: where it does not.
        best_bandwidth: of the links between chips and of the network between slices.
        worst_bandwidth: a ring along one axis uses only the links of that axis.
    """

    best_utilisation: float = 0.6
    worst_utilisation: float = 0.3
    best_bandwidth: float = 0.8
    worst_bandwidth: float = 0.25

    def __str__(self) -> str:
        return (
            f"computing at {self.best_utilisation:.0%} to {self.worst_utilisation:.0%} of the peak, exchanging at "
            f"{self.best_bandwidth:.0%} to {self.worst_bandwidth:.0%} of the links' bandwidth; the least time hides "
            "all exchange behind computing, and is no shorter than reading parameters and batch from memory once; the "
            "most hides none; no input, evaluation or checkpoint"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """An estimate with its lower and upper bound."""

    least: float
    most: float

    def scaled(self, factor: float) -> "Range":
        return Range(least=self.least * factor, most=self.most * factor)


def step_seconds(
    chip: Chip,
    *,
    flops: float,
    link_bytes: float = 0.0,
    network_bytes: float = 0.0,
    argument_bytes: float = 0.0,
    assumptions: Assumptions = Assumptions(),
) -> Range | None:
    """The duration of a step; None if the chip's specifications are unknown.

    Args:
        chip: one of those that run the step.
        flops: operations of its matrix products.
        link_bytes: bytes that it sends to chips of its slice.
        network_bytes: bytes that it sends to other slices.
        argument_bytes: parameters, optimizer and batch in its memory, which the step reads.
        assumptions: of the estimate.
    """
    sent = [(link_bytes, chip.link_bandwidth), (network_bytes, chip.network_bandwidth)]
    if chip.peak_flops is None or any(size and bandwidth is None for size, bandwidth in sent):
        return None
    computing = flops / chip.peak_flops
    exchanging = sum(size / bandwidth for size, bandwidth in sent if size)
    reading = argument_bytes / chip.memory_bandwidth if chip.memory_bandwidth else 0.0
    least = max(computing / assumptions.best_utilisation, exchanging / assumptions.best_bandwidth, reading)
    most = computing / assumptions.worst_utilisation + exchanging / assumptions.worst_bandwidth
    return Range(least=least, most=max(most, reading))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Throughput, time and cost of a run.

    Attributes:
        tokens_a_day: positions of both sides, padding included.
        chip_hours: all chips, from the first step to the last.
        cost: in the currency of the price; None without a price.
    """

    tokens_a_day: Range
    chip_hours: Range
    cost: Range | None


def estimate_run(
    seconds: Range, *, tokens_a_step: int, run_tokens: int, chips: int, price: float | None
) -> RunEstimate:
    """The estimate of a run of `run_tokens` positions, whose steps take `seconds`; the price is of a chip-hour."""
    chip_hours = seconds.scaled(run_tokens / tokens_a_step * chips / 3600)
    return RunEstimate(
        tokens_a_day=Range(least=DAY * tokens_a_step / seconds.most, most=DAY * tokens_a_step / seconds.least),
        chip_hours=chip_hours,
        cost=None if price is None else chip_hours.scaled(price),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step and the result of its compilation.

    Attributes:
        result: what `compile_bounded` returned.
        run_tokens: positions that the whole run reads.
        price: of a chip-hour; None if it is unknown.
    """

    request: StepRequest
    result: Mapping[str, Any]
    run_tokens: int
    price: float | None = None
    assumptions: Assumptions = Assumptions()

    @property
    def compiled(self) -> bool:
        return self.result["status"] == "compiled"

    @property
    def memory(self) -> int | None:
        """Bytes a chip: arguments + temporaries + outputs - aliases, and the program itself."""
        if not self.compiled:
            return None
        of_compiler = self.result["memory"]
        # The step may not read all that is kept between steps, but it takes memory all the same.
        arguments = max(of_compiler["arguments"], sum(self.result["held"].values()))
        others = of_compiler["temporaries"] + of_compiler["outputs"] - of_compiler["aliases"] + of_compiler["program"]
        return arguments + others

    @property
    def fits(self) -> bool:
        """Whether it compiled and its memory is within the chip's, where that is known."""
        available = self.request.topology.chip.memory
        return self.compiled and (available is None or self.memory <= available)

    @property
    def status(self) -> str:
        """ "fits", "too big", or another outcome; "proxy" if the CPU compiler was used instead."""
        if not self.compiled:
            return self.result["status"]
        if not self.fits:
            return "too big"
        return "proxy" if self.request.topology.is_proxy else "fits"

    @property
    def reason(self) -> str:
        """Why it does not fit, in a line; empty if it does."""
        if self.compiled:
            return "" if self.fits else "its memory exceeds the chip's"
        reason = " ".join(self.result["reason"].split())
        used = _USED_BY_COMPILER.search(reason)
        return used[0] if used else reason[:300]

    @property
    def model_flops(self) -> int:
        """Of the whole step by our formula."""
        request = self.request
        return step_flops(request.student, request.teacher, request.objective, request.lengths).total

    @property
    def seconds(self) -> Range | None:
        """Of a step; None where the chip or the step is not known."""
        if not self.compiled:
            return None
        traffic = self.result["collectives"]
        return step_seconds(
            self.request.topology.chip,
            flops=self.result["flops"],
            link_bytes=sum(each["sent"] for each in traffic if not each["crosses_slices"]),
            network_bytes=sum(each["sent"] for each in traffic if each["crosses_slices"]),
            argument_bytes=self.result["memory"]["arguments"],
            assumptions=self.assumptions,
        )

    @property
    def run(self) -> RunEstimate | None:
        """Of the whole run; None as above."""
        if self.seconds is None:
            return None
        return estimate_run(
            self.seconds,
            tokens_a_step=self.request.tokens,
            run_tokens=self.run_tokens,
            chips=self.request.topology.chips,
            price=self.price,
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        request = dataclasses.asdict(self.request)
        request["topology"]["name"] = self.request.topology.name
        request["objective"] = plain(self.request.objective.described())
        known = self.seconds is not None
        return {
            "topology": self.request.topology.name,
            "chips": self.request.topology.chips,
            "batch_per_chip": self.request.batch_per_chip,
            "status": self.status,
            "reason": self.reason,
            "memory_per_chip": self.memory,
            "model_flops": self.model_flops,
            "step_seconds": dataclasses.asdict(self.seconds) if known else None,
            "run": dataclasses.asdict(self.run) if known else None,
            "assumptions": dataclasses.asdict(self.assumptions),
            "price": self.price,
            "found": dict(self.result),
            "asked": request,
        }
