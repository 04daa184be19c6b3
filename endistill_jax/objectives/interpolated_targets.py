"""Interpolated targets: what a student learns from moves from its own distributions to its teacher's over training.

With the teacher's share t of the scores, of a relation's rows as of a token's words,

    target = softmax((1 - t) * student scores + t * teacher scores),    a constant,    loss = KL(target || student)

(the reading of Shing et al., arXiv 2501.16937, for logits; for relations it is ours). No score is formed for it. Scores
are products, and a weighted sum of two products is one product of longer vectors: [x, y] . [x', y'] = x . x' + y . y'.
So the target is the output of a model whose vectors are both models' put together, and every form of the losses takes
it for a teacher.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from endistill_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterpolatedTargets:
    """How the teacher's share of the target scores grows: linearly, and stays at 1.

    Attributes:
      start: share before the first step, from 0 to 1.
      steps: from this step on, counted from 1, the targets are the teacher's.
    """

    start: float = 0.0
    steps: int

    def __post_init__(self):
        if not 0 <= self.start <= 1:
            raise UserError(f"InterpolatedTargets.start is {self.start}; it must be from 0 to 1")
        if self.steps < 1:
            raise UserError(f"InterpolatedTargets.steps is {self.steps}; it must be at least 1")

    def share(self, step: jax.Array) -> jax.Array:
        """The teacher's share at a step that counts from 0, float32 scalar; never 0.

        A share of 0 would leave rounding errors for a gradient, which optimizers scale up to whole updates.
        """
        return self.start + (1 - self.start) * jnp.minimum((step.astype(jnp.float32) + 1) / self.steps, 1.0)


def interpolate_output(teacher: Any, student: Any, share: jax.Array, relation_heads: Mapping[str, int]) -> Any:
    """The output of a teacher whose scores are `share` the teacher's and `1 - share` the student's.

    Args:
      teacher: named tuple with `taps` (site -> named tuple of vectors `[batch, length, teacher_inner]`), and `logits`
        `[batch, target, vocabulary]` or `head` (`hidden` `[batch, target, d_model]`, `kernel` `[d_model, vocabulary]`).
      student: the same of the student; taken as a constant.
      share: scalar from 0 to 1.
      relation_heads: of each compared site; its vectors are put together head by head.

    Returns:
      The teacher's output with taps of width teacher_inner + student_inner and a head of the sum of both widths, or the
      weighted sum of both logits.
    """
    student = jax.lax.stop_gradient(student)
    taps = {
        site: type(tap)(
            *(
                _joined(ours, own, share, relation_heads[site])
                for ours, own in zip(tap, student.taps[site], strict=True)
            )
        )
        for site, tap in teacher.taps.items()
    }
    logits, head = teacher.logits, teacher.head
    if logits is not None:
        logits = share * logits.astype(jnp.float32) + (1 - share) * student.logits.astype(jnp.float32)
    if head is not None:
        hidden = jnp.concatenate([_scaled(head.hidden, share), _scaled(student.head.hidden, 1 - share)], axis=-1)
        head = head._replace(hidden=hidden, kernel=jnp.concatenate([head.kernel, student.head.kernel]))
    return teacher._replace(taps=taps, logits=logits, head=head)


def _joined(teacher: jax.Array, student: jax.Array, share: jax.Array, heads: int) -> jax.Array:
    """Vectors of both models, head by head, `[batch, length, inner]`, so scaled that their relations interpolate.

    A relation divides its products by the root of its heads' size, and here both of its factors are scaled: by the
    fourth root of (joined size / own size), and by the root of the model's share.
    """

    def split(vectors: jax.Array) -> jax.Array:
        return vectors.reshape(*vectors.shape[:2], heads, -1)  # [batch, length, relation_heads, relation_dim]

    parts = [split(teacher), split(student)]
    sizes = [part.shape[-1] for part in parts]
    factors = [
        jnp.sqrt(part) * (sum(sizes) / size) ** 0.25 for part, size in zip((share, 1 - share), sizes, strict=True)
    ]
    joined = jnp.concatenate([_scaled(part, factor) for part, factor in zip(parts, factors, strict=True)], axis=-1)
    return joined.reshape(*teacher.shape[:2], -1)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """In the type of `x`, but by the whole factor: rounded to bfloat16, it would be up to 0.4 % off for every score."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
