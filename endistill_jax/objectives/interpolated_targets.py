"""Interpolated targets: what a student learns from moves from its own distributions to its teacher's over training.

With the teacher's share t of the scores, of a relation's rows as of a token's logits,

    target = softmax((1 - t) * student scores + t * teacher scores),    a constant,    loss = KL(target || student)

(the reading of TAID, Shing et al., arXiv 2501.16937, for logits; for relations it is ours). No score is formed for it.
Scores are products, and a weighted sum of two products is one product of longer vectors: [x, y] . [x', y'] = x . x' +
y . y'. So the target is the output of a model whose vectors are both models' put together, and every form of the losses
takes it for a teacher.

The share grows linearly, or faster where the loss falls (TAID's adaptive schedule): with J the loss,

    m <- momentum * m + (1 - momentum) * (J_before - J) / J_before
    t <- max(linear share, t + rate * sigmoid(m) * (1 - t))
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.errors import require_at_least, require_between, require_not_negative
from endistill_jax.core.model_io import Head

Scalar = Float[Array, ""]
ShareState = dict[str, Scalar]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolatedTargets:
    """How the teacher's share of the target scores grows, up to 1."""

    start: float = 0.0  # share before the first step, from 0 to 1
    steps: int  # from this step on, counted from 1, the targets are the teacher's
    adaptive_rate: float = 0.0  # how much faster than linearly the share grows while the loss falls; 0 for linearly
    momentum: float = 0.99  # of the loss's relative change, where the share adapts

    def __post_init__(self):
        require_between(self, "start", 0, 1)
        require_at_least(self, 1, "steps")
        require_not_negative(self, "adaptive_rate")
        require_between(self, "momentum", 0, 1)

    def init_state(self) -> ShareState | None:
        """What the share carries from step to step; None where it follows from the step alone."""
        if not self.adaptive_rate:
            return None
        zero = jnp.zeros((), jnp.float32)
        return {"share": jnp.full((), self.start, jnp.float32), "change": zero, "loss": zero}

    def share(self, step: Int[Array, ""], state: ShareState | None = None) -> Scalar:
        """The teacher's share at a step that counts from 0, float32; never 0.

        A share of 0 would leave rounding errors for a gradient, which optimizers scale up to whole updates.
        """
        linear = self.start + (1 - self.start) * jnp.minimum((step.astype(jnp.float32) + 1) / self.steps, 1.0)
        return linear if state is None else jnp.maximum(linear, state["share"])

    def update(self, step: Int[Array, ""], state: ShareState | None, loss: Scalar) -> ShareState | None:
        """The state after a step whose loss was measured."""
        if state is None:
            return None
        share, before = self.share(step, state), state["loss"]
        change = jnp.where(before > 0, (before - loss) / jnp.where(before > 0, before, 1.0), 0.0)
        change = self.momentum * state["change"] + (1 - self.momentum) * change
        share = jnp.minimum(share + self.adaptive_rate * jax.nn.sigmoid(change) * (1 - share), 1.0)
        return {"share": share, "change": change, "loss": loss.astype(jnp.float32)}


def joined(
    teacher: Float[Array, "batch length teacher_inner"],
    student: Float[Array, "batch length student_inner"],
    share: Scalar,
    heads: int,
    *,
    keep_scale: bool = False,
) -> Float[Array, "batch length teacher_inner+student_inner"]:
    """Vectors of both models, as constants, put together head by head, so scaled that their scores interpolate.

    With `keep_scale` the scores are plain products. Otherwise they are divided by the root of their heads' size, and
    each of a score's two factors is scaled by the fourth root of (joined size / own size) to make up for it.
    """

    def split(vectors: Float[Array, "batch length inner"]) -> Float[Array, "batch length heads head_size"]:
        return vectors.reshape(*vectors.shape[:2], heads, -1)

    parts = [split(teacher), split(jax.lax.stop_gradient(student))]
    size = sum(part.shape[-1] for part in parts)
    scaled = []
    for part, own_share in zip(parts, (share, 1 - share), strict=True):
        factor = jnp.sqrt(own_share)
        scaled.append(_scaled(part, factor if keep_scale else factor * (size / part.shape[-1]) ** 0.25))
    return jnp.concatenate(scaled, axis=-1).reshape(*teacher.shape[:2], -1)


def joined_head(teacher: Head, student: Head, share: Scalar) -> Head:
    """The head of a teacher whose logits are `share` the teacher's and `1 - share` the student's, a constant."""
    student = jax.lax.stop_gradient(student)
    hidden = jnp.concatenate([_scaled(teacher.hidden, share), _scaled(student.hidden, 1 - share)], axis=-1)
    return Head(hidden, jnp.concatenate([teacher.kernel, student.kernel]))


def _scaled(x: Float[Array, "*shape"], factor: Scalar) -> Float[Array, "*shape"]:
    # By the whole factor, then in the type of `x`: rounded to bfloat16, it would be up to 0.4 % off for every score.
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
