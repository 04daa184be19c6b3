"""Evaluations of models on held-out data, and the interface they share."""

import dataclasses
from typing import Any, Protocol

from endistill_jax.models.family import ModelConfig


class Report(Protocol):
    """The result of an evaluation."""

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The metrics by name, deterministic for given parameters."""

    def summary(self) -> str:
        """The most important of them as a part of one line."""


class Evaluation(Protocol):
    """Evaluates models."""

    def evaluate(self, config: ModelConfig, params: Any) -> Report:
        """The metrics of one model, its parameters on the host or on the mesh."""


@dataclasses.dataclass(frozen=True)
class JointReport:
    """The reports of several evaluations of one model; metric names must not repeat."""

    reports: tuple[Report, ...]

    def scalars(self, prefix: str = "") -> dict[str, float]:
        return {name: value for report in self.reports for name, value in report.scalars(prefix).items()}

    def summary(self) -> str:
        return ", ".join(report.summary() for report in self.reports)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointEvaluation:
    """Several evaluations as one."""

    evaluations: tuple[Evaluation, ...]

    def evaluate(self, config: ModelConfig, params: Any) -> JointReport:
        return JointReport(tuple(each.evaluate(config, params) for each in self.evaluations))
