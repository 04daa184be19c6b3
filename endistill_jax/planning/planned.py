"""A planned step: the result of its compilation and derived estimates."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from endistill_jax.checkpoints.manifest import plain
from endistill_jax.planning.estimate import Assumptions, Load, Range, RunEstimate, estimate_run, step_seconds
from endistill_jax.planning.request import StepRequest
from endistill_jax.train.flops import step_flops

COMPILED = "compiled"
_USED_BY_COMPILER = re.compile(r"Used [\d.]+\w? of [\d.]+\w? hbm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step and its answer.

    Attributes:
        request: the step.
        result: what `compile_bounded` returned.
        run_tokens: positions that the whole run reads.
        price: of a chip-hour; None if it is unknown.
        assumptions: of the estimate.
    """

    request: StepRequest
    result: Mapping[str, Any]
    run_tokens: int
    price: float | None = None
    assumptions: Assumptions = Assumptions()

    @property
    def compiled(self) -> bool:
        """Whether it compiled."""
        return self.result["status"] == COMPILED

    @property
    def memory(self) -> int | None:
        """Bytes a chip: arguments + temporaries + outputs - aliases, and the program itself.

        What is kept between steps but not read by the step counts as an argument.
        """
        if not self.compiled:
            return None
        of_compiler = self.result["memory"]
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
        """Of the whole step by our formula; see `train/flops.py`."""
        request = self.request
        return step_flops(request.student, request.teacher, request.objective, request.lengths).total

    @property
    def load(self) -> Load:
        """What one chip does; only of a compiled step."""
        traffic = self.result["collectives"]
        return Load(
            flops=self.result["flops"],
            link_bytes=sum(each["sent"] for each in traffic if not each["crosses_slices"]),
            network_bytes=sum(each["sent"] for each in traffic if each["crosses_slices"]),
            argument_bytes=self.result["memory"]["arguments"],
        )

    @property
    def seconds(self) -> Range | None:
        """Of a step; None where the chip or the step is not known."""
        return step_seconds(self.load, self.request.topology.chip, self.assumptions) if self.compiled else None

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
