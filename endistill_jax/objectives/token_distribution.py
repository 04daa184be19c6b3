"""A model's distributions over the vocabulary for some tokens, of which a device may have a part of the columns."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Columns = Float[Array, "tokens columns"]
Tokens = Float[Array, " tokens"]


class TokenDistribution:
    """softmax(logits) for some tokens, while a program is traced; what several losses need of it is computed once.

    Args:
        logits: float32.
        targets: the real tokens; one that is in no vocabulary has no logit.
        axis: the mesh axis over which the columns are split; None where all of them are here.
    """

    def __init__(self, logits: Columns, targets: Int[Array, " tokens"], axis: str | None = None):
        self.logits, self.targets, self.axis = logits, targets, axis

    def with_logits(self, logits: Columns) -> "TokenDistribution":
        """The same tokens with other logits."""
        return TokenDistribution(logits, self.targets, self.axis)

    def sum(self, x: Columns) -> Tokens:
        """Sum over the whole vocabulary."""
        total = jnp.sum(x, axis=-1)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def log_softmax(self, temperature: float = 1.0) -> Columns:
        """Log-probabilities of the softened distribution."""
        shifted, _, total = self.softened(temperature)
        return shifted - jnp.log(total)[:, None]

    def softened(self, temperature: float) -> tuple[Columns, Columns, Tokens]:
        """Logits less each token's largest, their exponentials, and the sum of those."""
        if temperature == 1:
            return self.shifted, self.exp, self.exp_sum
        shifted = self.shifted / temperature
        exp = jnp.exp(shifted)
        return shifted, exp, self.sum(exp)

    @property
    def parts(self) -> int:
        """Devices that the columns are split over."""
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    @functools.cached_property
    def largest(self) -> Tokens:
        """The largest logit; a constant, which no gradient goes through."""
        largest = jnp.max(jax.lax.stop_gradient(self.logits), axis=-1)
        return largest if self.axis is None else jax.lax.pmax(largest, self.axis)

    @functools.cached_property
    def shifted(self) -> Columns:
        """The logits less the largest of the token."""
        return self.logits - self.largest[:, None]

    @functools.cached_property
    def exp(self) -> Columns:
        """Of `shifted`."""
        return jnp.exp(self.shifted)

    @functools.cached_property
    def exp_sum(self) -> Tokens:
        """Of `exp`."""
        return self.sum(self.exp)

    @functools.cached_property
    def log_normalizer(self) -> Tokens:
        """The log of the sum of the exponentials of the logits."""
        return self.largest + jnp.log(self.exp_sum)

    @functools.cached_property
    def columns(self) -> Int[Array, " tokens"]:
        """The targets as columns of this device; other numbers where a target is another device's."""
        offset = 0 if self.axis is None else self.logits.shape[-1] * jax.lax.axis_index(self.axis)
        return self.targets - offset

    @functools.cached_property
    def is_target(self) -> Bool[Array, "tokens columns"]:
        """Where the target is."""
        return jnp.arange(self.logits.shape[-1]) == self.columns[:, None]

    @functools.cached_property
    def in_vocabulary(self) -> Bool[Array, " tokens"]:
        """Whether the target is in the vocabulary."""
        return (self.targets >= 0) & (self.targets < self.parts * self.logits.shape[-1])

    @functools.cached_property
    def cross_entropy(self) -> Tokens:
        """Nats of the target, not for differentiation; NaN where it is in no vocabulary."""
        shifted = jnp.take_along_axis(self.shifted, self.columns[:, None], axis=1, mode="clip")[:, 0]
        here = (self.columns >= 0) & (self.columns < self.logits.shape[-1])
        shifted = jnp.where(here, shifted, 0.0)
        if self.axis is not None:
            shifted = jax.lax.psum(shifted, self.axis)
        return jnp.where(self.in_vocabulary, jnp.log(self.exp_sum) - shifted, jnp.nan)
