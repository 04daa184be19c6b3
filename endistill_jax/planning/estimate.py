"""Estimates the range of step times of a compiled step, and from it tokens per day, chip-hours and cost.

    computing    operations of a chip / (peak x utilization)
    exchanging   bytes that a chip sends / (its bandwidth x the share of it that is used)
    reading      bytes of the step's arguments / bandwidth of the chip's memory: each of them once
    least time   the longest of the three, each at its best: all exchange hidden behind computation
    most time    the sum of the first two, each at its worst: none hidden

Nothing here was measured on such chips; the assumptions are stated with every estimate.
"""

import dataclasses

from endistill_jax.planning.chips import Chip

DAY = 86400.0


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
        """Both times a factor."""
        return Range(least=self.least * factor, most=self.most * factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What one chip does in a step.

    Attributes:
        flops: operations of its matrix products.
        link_bytes: bytes that it sends to chips of its slice.
        network_bytes: bytes that it sends to other slices.
        argument_bytes: parameters, optimizer and batch in its memory, which the step reads.
    """

    flops: float
    link_bytes: float = 0.0
    network_bytes: float = 0.0
    argument_bytes: float = 0.0


def step_seconds(load: Load, chip: Chip, assumptions: Assumptions = Assumptions()) -> Range | None:
    """The duration of a step; None if the chip's specifications are unknown."""
    if chip.peak_flops is None:
        return None
    best, worst = (
        (_computing(load, chip, utilisation), _exchanging(load, chip, bandwidth))
        for utilisation, bandwidth in (
            (assumptions.best_utilisation, assumptions.best_bandwidth),
            (assumptions.worst_utilisation, assumptions.worst_bandwidth),
        )
    )
    if None in (*best, *worst):
        return None
    reading = load.argument_bytes / chip.memory_bandwidth if chip.memory_bandwidth else 0.0
    return Range(least=max(*best, reading), most=max(sum(worst), reading))


def _computing(load: Load, chip: Chip, utilisation: float) -> float:
    return load.flops / (chip.peak_flops * utilisation)


def _exchanging(load: Load, chip: Chip, share: float) -> float | None:
    seconds = 0.0
    for sent, bandwidth in (
        (load.link_bytes, chip.link_bandwidth),
        (load.network_bytes, chip.network_bandwidth),
    ):
        if sent and bandwidth is None:
            return None
        seconds += sent / (bandwidth * share) if sent else 0.0
    return seconds


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
    """Args:
    seconds: of a step.
    tokens_a_step: positions of the global batch.
    run_tokens: positions that the run reads in all.
    chips: how many work on it.
    price: of a chip-hour; None if it is unknown.
    """
    chip_hours = seconds.scaled(run_tokens / tokens_a_step * chips / 3600)
    return RunEstimate(
        tokens_a_day=Range(least=DAY * tokens_a_step / seconds.most, most=DAY * tokens_a_step / seconds.least),
        chip_hours=chip_hours,
        cost=None if price is None else chip_hours.scaled(price),
    )
