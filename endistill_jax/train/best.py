"""Which evaluation of a run was the best, and when to stop early."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MODES = ("min", "max")


@dataclasses.dataclass(kw_only=True)
class Best:
    """The best evaluation so far by one metric; without a metric, the last.

    Attributes:
        metric: its name.
        mode: "min" or "max", whichever is better.
        patience: number of evaluations without improvement after which the run ends; None never ends it early.
        step: of the best evaluation; None before the first.
        metrics: its scalars.
        waited: evaluations since then.
    """

    metric: str | None = None
    mode: str = "min"
    patience: int | None = None
    step: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    waited: int = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Records an evaluation and returns whether it is the best so far. NaN never is."""
        better = self.metric is not None and self._is_better(metrics[self.metric])
        self.waited = 0 if better else self.waited + 1
        if better or self.metric is None or self.step is None:
            self.step, self.metrics = step, dict(metrics)
        return better

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def plain(self) -> dict[str, Any]:
        """The entry in a manifest."""
        return {"step": self.step, "metrics": dict(self.metrics), "waited": self.waited}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restores the state from a manifest."""
        self.step, self.metrics, self.waited = saved["step"], dict(saved["metrics"]), saved["waited"]

    def _is_better(self, value: float) -> bool:
        so_far = self.metrics.get(self.metric, math.nan)
        if math.isnan(value) or math.isnan(so_far):
            return not math.isnan(value)
        return value < so_far if self.mode == "min" else value > so_far
