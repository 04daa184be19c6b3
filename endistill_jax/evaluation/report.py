"""What a training run asks of whatever judges its model meanwhile."""

from typing import Any, Protocol

from endistill_jax.model.config import T5Config


class Report(Protocol):
    """What one evaluation found."""

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The figures by name, the same in every run of the same parameters."""

    def summary(self) -> str:
        """The most important of them as a part of one line."""


class Evaluation(Protocol):
    """Something that judges models."""

    def evaluate(self, config: T5Config, params: Any) -> Report:
        """The figures of one model, its parameters on the host or on the mesh."""
