"""The losses over the vocabulary for some tokens, from hidden states and heads: values and gradient by the logits."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from endistill_jax.objectives.implementation import Placement


class Head(NamedTuple):
    """A head that is not applied: its logits would be `hidden @ kernel`, multiplied in the type of `hidden`.

    Attributes:
      hidden: `[batch, target, d_model]`, scaled if the model scales it.
      kernel: `[d_model, vocabulary]`.
    """

    hidden: jax.Array
    kernel: jax.Array


class VocabularySums(NamedTuple):
    """Weighted sums over tokens, float32 scalars in nats; constants for differentiation.

    Attributes:
      logits: as of `logits_kl`; 0 if it is not in the loss.
      lm: as of `cross_entropy` with the z-loss; 0 if it is not in the loss.
      cross_entropy: of the student with the real targets.
      teacher_cross_entropy: of the teacher; 0 without one.
    """

    logits: jax.Array
    lm: jax.Array
    cross_entropy: jax.Array
    teacher_cross_entropy: jax.Array


class Factors(NamedTuple):
    """What the two terms of the loss are multiplied by, float32 scalars; None for a term that is not in it."""

    logits: jax.Array | None
    lm: jax.Array | None


class Tokens(NamedTuple):
    """Some tokens: hidden states `[tokens, d_model]`, targets and weights `[tokens]`."""

    student: jax.Array
    teacher: jax.Array | None
    targets: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is known before the arrays are; `vocabulary_axis` is the mesh axis over which the vocabulary is split."""

    temperature: float
    z_loss: float
    chunk_bytes: int
    placement: Placement | None
    vocabulary_axis: str | None


def token_sums(
    settings: Settings, kernels: Sequence[jax.Array | None], chunk: Tokens, factors: Factors, with_gradient: bool
) -> tuple[VocabularySums, jax.Array | None]:
    """The sums of a chunk, and the gradient of the loss by the student's logits, float32 `[tokens, vocabulary]`."""
    axis, zero = settings.vocabulary_axis, jnp.zeros((), jnp.float32)
    size = kernels[0].shape[1]
    columns = chunk.targets - (0 if axis is None else size * jax.lax.axis_index(axis))
    known = (chunk.targets >= 0) & (chunk.targets < (size if axis is None else size * jax.lax.axis_size(axis)))
    unknown = jnp.where((chunk.weights != 0) & ~known, jnp.nan, 0.0)

    student = _Distribution.of(chunk.student, kernels[0], columns, axis)
    cross_entropy = student.log_sum - student.target + unknown
    sums = VocabularySums(zero, zero, jnp.sum(chunk.weights * cross_entropy), zero)
    gradient = zero
    if factors.lm is not None:
        normaliser = student.largest + student.log_sum
        lm = cross_entropy + settings.z_loss * jnp.square(normaliser)
        sums = sums._replace(lm=jnp.sum(chunk.weights * lm))
        row = jnp.where(known, factors.lm * chunk.weights, 0.0)
        slope = row * (1 + 2 * settings.z_loss * normaliser) / student.sum
        gradient += student.exp * slope[:, None] - jnp.where(jnp.arange(size) == columns[:, None], row[:, None], 0.0)
    if kernels[1] is not None:
        teacher = _Distribution.of(chunk.teacher, kernels[1], columns, axis)
        sums = sums._replace(
            teacher_cross_entropy=jnp.sum(chunk.weights * (teacher.log_sum - teacher.target + unknown))
        )
        if factors.logits is not None:
            divergence, by_logits = _divergence(settings, teacher, student)
            sums = sums._replace(logits=jnp.sum(chunk.weights * divergence))
            gradient += (factors.logits * chunk.weights)[:, None] * by_logits
    return sums, gradient if with_gradient else None


class _Distribution(NamedTuple):
    """A model's distributions over the vocabulary for some tokens, of which a device has a part of the columns.

    Attributes:
      shifted: float32 `[tokens, vocabulary]`, the logits less the largest of the token.
      exp: of `shifted`.
      largest: `[tokens]`, over all columns, as are the next.
      sum: of `exp`.
      log_sum: the logarithm of `sum`.
      target: of `shifted` at the target; 0 where the target is no column.
    """

    shifted: jax.Array
    exp: jax.Array
    largest: jax.Array
    sum: jax.Array
    log_sum: jax.Array
    target: jax.Array

    @classmethod
    def of(cls, hidden: jax.Array, kernel: jax.Array, columns: jax.Array, axis: str | None) -> "_Distribution":
        logits = product("td,dv->tv", hidden, kernel)
        largest = jnp.max(logits, axis=-1)
        if axis is not None:
            largest = jax.lax.pmax(largest, axis)
        shifted = logits - largest[:, None]
        exp = jnp.exp(shifted)
        total = _sum_columns(exp, axis)
        target = jnp.take_along_axis(shifted, columns[:, None], axis=1, mode="clip")[:, 0]
        target = jnp.where((columns >= 0) & (columns < shifted.shape[1]), target, 0.0)
        if axis is not None:
            target = jax.lax.psum(target, axis)
        return cls(shifted, exp, largest, total, jnp.log(total), target)


def _divergence(settings: Settings, teacher: _Distribution, student: _Distribution) -> tuple[jax.Array, jax.Array]:
    """`temperature^2 * KL(teacher || student)` `[tokens]`, and its gradient by the student's logits."""
    axis, temperature = settings.vocabulary_axis, settings.temperature

    def softened(of: _Distribution) -> tuple[jax.Array, jax.Array, jax.Array]:
        if temperature == 1:
            return of.shifted, of.exp, of.sum
        shifted = of.shifted / temperature
        exp = jnp.exp(shifted)
        return shifted, exp, _sum_columns(exp, axis)

    teacher_shifted, teacher_exp, teacher_sum = softened(teacher)
    student_shifted, student_exp, student_sum = softened(student)
    teacher_share, student_share = 1 / teacher_sum, 1 / student_sum
    expected = _sum_columns(teacher_exp * (teacher_shifted - student_shifted), axis) * teacher_share
    divergence = temperature**2 * (expected + jnp.log(student_sum) - jnp.log(teacher_sum))
    gradient = student_exp * student_share[:, None] - teacher_exp * teacher_share[:, None]
    return divergence, temperature * gradient


def _sum_columns(x: jax.Array, axis: str | None) -> jax.Array:
    total = jnp.sum(x, axis=-1)
    return total if axis is None else jax.lax.psum(total, axis)


def product(axes: str, first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.einsum(axes, first, second, preferred_element_type=jnp.float32)
