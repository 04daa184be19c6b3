"""Cross-entropy with the real next token: the language model's own loss."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.settings import require_not_negative
from endistill_jax.objectives.token_distribution import TokenDistribution
from endistill_jax.objectives.token_term import TokenTerm


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(TokenTerm):
    """`lse(logits) - logits[target] + z_loss * lse(logits)^2`.

    A target outside the vocabulary gives NaN rather than a plausible number.

    Attributes:
        z_loss: coefficient of the squared log normalizer, which keeps it near zero.
    """

    z_loss: float = 0.0

    def __post_init__(self):
        require_not_negative(self, "z_loss")

    def default_name(self) -> str:
        return "lm"

    @property
    def needs_teacher(self) -> bool:
        return False

    def token_loss(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Int[Array, " tokens"]
    ) -> Float[Array, " tokens"]:
        # A comparison and a sum rather than a gather: its gradient is no scatter, and stays where the columns are.
        target = student.sum(jnp.where(student.is_target, student.logits, 0.0))
        normalizer = student.log_normalizer
        losses = normalizer - target + self.z_loss * jnp.square(normalizer)
        return jnp.where(student.in_vocabulary, losses, jnp.nan)

    def loss_and_gradient(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Int[Array, " tokens"]
    ) -> tuple[Float[Array, " tokens"], Float[Array, "tokens columns"]]:
        losses = student.cross_entropy + self.z_loss * jnp.square(student.log_normalizer)
        slope = (1 + 2 * self.z_loss * student.log_normalizer) / student.exp_sum
        gradient = student.exp * slope[:, None] - student.is_target
        return losses, jnp.where(student.in_vocabulary[:, None], gradient, 0.0)
