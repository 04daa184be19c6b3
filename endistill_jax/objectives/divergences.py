"""Divergences between the teacher's and the student's distributions over the vocabulary, softened by a temperature.

All are multiplied by `temperature^2`, which keeps the size of the gradient about the same at all temperatures (Hinton
et al., arXiv 1503.02531). With p the teacher's and q the student's softened distribution:

    ForwardKL        KL(p || q)
    ReverseKL        KL(q || p)
    GeneralizedJSD   beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q      (arXiv 2306.13649)
    SkewedKL         KL(p || alpha p + (1 - alpha) q)                                         (arXiv 2402.03898)
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.settings import require_between, require_positive
from endistill_jax.objectives.token_distribution import TokenDistribution
from endistill_jax.objectives.token_term import TokenTerm

Columns = Float[Array, "tokens columns"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Divergence(TokenTerm):
    temperature: float = 1.0

    def __post_init__(self):
        require_positive(self, "temperature")

    def token_loss(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Int[Array, " tokens"]
    ) -> Float[Array, " tokens"]:
        log_p, log_q = teacher.log_softmax(self.temperature), student.log_softmax(self.temperature)
        return self.temperature**2 * student.sum(self.terms(log_p, log_q))

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        """What is summed over the vocabulary, of the two log-probabilities."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardKL(_Divergence):
    """KL(teacher || student): the student covers all that the teacher does."""

    def default_name(self) -> str:
        return "logits"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        return jnp.exp(log_p) * (log_p - log_q)

    def loss_and_gradient(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Int[Array, " tokens"]
    ) -> tuple[Float[Array, " tokens"], Float[Array, "tokens columns"]]:
        """By hand: the exponentials are those of the cross-entropies, and no log-probability is formed."""
        teacher_shifted, teacher_exp, teacher_sum = teacher.softened(self.temperature)
        student_shifted, student_exp, student_sum = student.softened(self.temperature)
        teacher_share, student_share = 1 / teacher_sum, 1 / student_sum
        expected = student.sum(teacher_exp * (teacher_shifted - student_shifted)) * teacher_share
        losses = self.temperature**2 * (expected + jnp.log(student_sum) - jnp.log(teacher_sum))
        gradient = student_exp * student_share[:, None] - teacher_exp * teacher_share[:, None]
        return losses, self.temperature * gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(_Divergence):
    """KL(student || teacher): the student keeps to where the teacher is."""

    def default_name(self) -> str:
        return "reverse_kl"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        return jnp.exp(log_q) * (log_q - log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralizedJSD(_Divergence):
    """Between both: near beta = 0 like the forward, near 1 like the reverse divergence, each times beta (1 - beta)."""

    beta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        require_between(self, "beta", 0, 1, open_ends=True)

    def default_name(self) -> str:
        return "jsd"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        log_m = jnp.logaddexp(log_p + jnp.log(self.beta), log_q + jnp.log1p(-self.beta))
        return self.beta * jnp.exp(log_p) * (log_p - log_m) + (1 - self.beta) * jnp.exp(log_q) * (log_q - log_m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkewedKL(_Divergence):
    """KL from the teacher to a mixture of both, which is bounded where the student has no mass."""

    alpha: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require_between(self, "alpha", 0, 1, open_ends=True)

    def default_name(self) -> str:
        return "skewed_kl"

    def terms(self, log_p: Columns, log_q: Columns) -> Columns:
        log_m = jnp.logaddexp(log_p + jnp.log(self.alpha), log_q + jnp.log1p(-self.alpha))
        return jnp.exp(log_p) * (log_p - log_m)
