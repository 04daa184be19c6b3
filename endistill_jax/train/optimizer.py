"""Optimizers and learning-rate schedules, all from optax."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from endistill_jax.core.errors import UserError

SCHEDULES = ("constant", "linear", "cosine", "rsqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
        name: "adamw" or "adafactor" (T5's own, with factored second moments and steps scaled by parameter size).
        learning_rate: peak of the schedule.
        schedule: what follows the linear warm-up: "constant", "linear" or "cosine" down to `end_fraction` of the peak,
            which the step after the last would have, or "rsqrt", the peak times sqrt(warmup_steps / step).
        warmup_steps: steps of linear warm-up from zero.
        end_fraction: see `schedule`.
        weight_decay: decoupled decay per step, relative to the learning rate, on matrices only.
        b1: decay of the first moment (AdamW).
        b2: decay of the second moment (AdamW).
        eps: added to the root of the second moment (AdamW).
        clip_norm: largest global gradient norm; larger gradients are scaled down. None clips nothing.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "cosine"
    warmup_steps: int = 0
    end_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self):
        if self.name not in ("adamw", "adafactor"):
            raise UserError(f"OptimizerConfig.name is {self.name!r}; choose adamw or adafactor")
        if self.schedule not in SCHEDULES:
            raise UserError(f"OptimizerConfig.schedule is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if not self.learning_rate > 0:  # rejects NaN too
            raise UserError(f"OptimizerConfig.learning_rate is {self.learning_rate}; it must be positive")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(
                f"OptimizerConfig.clip_norm is {self.clip_norm}; it must be positive, or None for no clipping"
            )
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"OptimizerConfig.{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.end_fraction <= 1:
            raise UserError(f"OptimizerConfig.end_fraction is {self.end_fraction}; it must be between 0 and 1")
        if self.schedule == "rsqrt" and self.warmup_steps < 1:
            raise UserError("OptimizerConfig.schedule rsqrt needs warmup_steps of at least 1")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step, for a run of `steps` steps."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps:
        raise UserError(f"OptimizerConfig.warmup_steps is {warmup}, but the run has {steps} steps; warm up for fewer")
    rest = steps - warmup
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.end_fraction, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.end_fraction),
        # Also evaluated during warm-up, where steps count from -warmup, and discarded.
        "rsqrt": lambda: lambda step: peak * (warmup / (jnp.maximum(step, 0) + warmup)) ** 0.5,
    }[config.schedule]()
    if not warmup:
        return after
    # Warm-up runs from peak / warmup, not 0, so that the first step has an effect.
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps, clipping included."""
    schedule = make_schedule(config, steps)
    if config.name == "adafactor":
        # Adafactor applies weight decay after the learning rate, so the decay must be scaled here.
        decay = (lambda step: config.weight_decay * schedule(step)) if config.weight_decay else None
        update = optax.adafactor(schedule, weight_decay_rate=decay, weight_decay_mask=matrices)
    else:
        update = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=matrices
        )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, update)


def matrices(params: Any) -> Any:
    """True for kernels and the embedding; false for normalization scales and position biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in ("kernel", "embedding"), params
    )
