"""How far a run is: its best evaluation, its totals, and what ends it early."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from endistill_jax.checkpoints.manifest import Manifest

MODES = ("min", "max")


@dataclasses.dataclass(kw_only=True)
class Best:
    """The best evaluation so far by `metric`; without one, the last.

    Attributes:
        patience: evaluations without improvement after which the run ends; None never ends it early.
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
        return self.patience is not None and self.waited >= self.patience

    def plain(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        return {"step": self.step, "metrics": dict(self.metrics), "waited": self.waited}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.step, self.metrics, self.waited = saved["step"], dict(saved["metrics"]), saved["waited"]

    def _is_better(self, value: float) -> bool:
        so_far = self.metrics.get(self.metric, math.nan)
        if math.isnan(value) or math.isnan(so_far):
            return not math.isnan(value)
        return value < so_far if self.mode == "min" else value > so_far


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Totals of a run; stored in the manifest, so that a resumed run continues them.

    Attributes:
        tokens: real tokens read, inputs and targets.
        seconds: spent in training steps, over all attempts; compilation included, evaluation and saving not.
    """

    best: Best = dataclasses.field(default_factory=Best)
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False

    def plain(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        totals = {"tokens": self.tokens, "seconds": self.seconds}
        return totals | {"best": self.best.plain(), "finished": self.finished}

    @classmethod
    def of(cls, manifest: Manifest) -> "Progress":
        """The totals of a checkpoint."""
        progress = cls()
        progress.restore(manifest)
        return progress

    def restore(self, manifest: Manifest, *, continued: bool = False) -> None:
        """Restores totals from a manifest; a finished run that is extended is no longer finished."""
        saved = manifest["progress"]
        self.tokens, self.seconds = saved["tokens"], saved["seconds"]
        if "best" in saved:
            self.best.restore(saved["best"])
        self.finished = saved.get("finished", False) and not continued
        if continued:
            self.best.waited = 0


class StopSignal(contextlib.AbstractContextManager):
    """Notes the first SIGTERM or Ctrl-C instead of letting it end the process; a second one acts as usual.

    Attributes:
        number: the first signal received; None before that.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell ignores Ctrl-C in background jobs of a script, and the script forwards it as SIGTERM: handled
            # here, it would count as the second signal.
            if signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # only the main thread may set handlers
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
