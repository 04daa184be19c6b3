"""Losses of the distributions over the vocabulary, token by token, and their plain form over all logits."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from endistill_jax.core.batch import Batch
from endistill_jax.core.errors import UserError
from endistill_jax.core.outputs import Head, Reads
from endistill_jax.objectives.term import ModelShape, Role, Term, TermInputs
from endistill_jax.objectives.token_distribution import TokenDistribution

CROSS_ENTROPY = "cross_entropy"
TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"

Scalar = Float[Array, ""]
Sums = dict[str, Scalar]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTerm(Term):
    """A loss of the distributions over the vocabulary, summed over target tokens by their loss weights.

    A subclass gives `token_loss`. It is called with all tokens (dense) or some at a time (blocked), on a device that
    may have only some of the vocabulary's columns, and is differentiated there. It has no parameters of its own.
    """

    def reads(self, role: Role) -> Reads:
        return Reads(head=role == "student" or self.needs_teacher)

    def weight(self, batch: Batch) -> Scalar:
        return jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)

    def token_loss(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Int[Array, " tokens"]
    ) -> Float[Array, " tokens"]:
        """Nats a token. Sums over the vocabulary are `student.sum`, so that its columns may be split."""
        raise NotImplementedError

    def loss_and_gradient(
        self, student: TokenDistribution, teacher: TokenDistribution | None, targets: Int[Array, " tokens"]
    ) -> tuple[Float[Array, " tokens"], Float[Array, "tokens columns"]]:
        """`token_loss`, and its gradient with respect to the student's logits.

        Derived here; a term that can do it in fewer passes over the logits overrides this.
        """

        def total(logits: Float[Array, "tokens columns"]) -> tuple[Scalar, Float[Array, " tokens"]]:
            losses = self.token_loss(student.with_logits(logits), teacher, targets)
            return jnp.sum(losses), losses

        gradient, losses = jax.grad(total, has_aux=True)(student.logits)
        # Every device has the whole loss, and a sum over devices transposes to a sum: each counts the others' too.
        return losses, gradient / student.parts

    def sum(self, inputs: TermInputs) -> Scalar:
        """Of all logits at once. A loss computes its token terms together; see `loss_and_sums`."""
        teacher = None if inputs.teacher is None else inputs.teacher.head
        targets, weights = inputs.batch["decoder_target_tokens"], inputs.batch["decoder_loss_weights"]
        return dense_token_sums((self,), inputs.student.head, teacher, targets, weights)[self.name]

    def validate(self, student: ModelShape, teacher: ModelShape | None) -> None:
        for role, model in (("student", student), ("teacher", teacher if self.needs_teacher else None)):
            if model is not None and not model.depth("decoder"):
                raise UserError(f"{self.name}: the {role} is an encoder alone, and has no distribution over tokens")
        if self.needs_teacher and teacher is not None and teacher.vocab_size != student.vocab_size:
            raise UserError(
                f"{self.name}: the vocabularies of teacher and student have {teacher.vocab_size} and "
                f"{student.vocab_size} entries; comparing their distributions needs one for both"
            )


def weighted_sum(losses: Float[Array, " tokens"], weights: Float[Array, " tokens"]) -> Scalar:
    """Not by a product: what is at weight 0 may be NaN, such as the cross-entropy of an impossible target."""
    return jnp.sum(jnp.where(weights != 0, weights * losses, 0.0))


def dense_token_sums(
    terms: Sequence[TokenTerm],
    student: Head,
    teacher: Head | None,
    targets: Int[Array, "batch target"],
    weights: Num[Array, "batch target"],
) -> Sums:
    """The plain form: by name the sum of every term and of the models' cross-entropies, which are constants.

    Args:
        terms: of the objective that read the distributions over the vocabulary.
        student: the student's head.
        teacher: the teacher's, a constant; None without one.
        targets: the real tokens.
        weights: not negative; 0 at padding.
    """

    def distribution(head: Head) -> TokenDistribution:
        # Cleared before the arithmetic: a `where` on the result alone would leave 0 * NaN in the gradient.
        hidden = jnp.where((weights != 0)[..., None], head.hidden, 0)
        return TokenDistribution(head._replace(hidden=hidden).logits().reshape(targets.size, -1), targets.reshape(-1))

    ours, theirs = distribution(student), None if teacher is None else distribution(teacher)
    targets, weights = targets.reshape(-1), weights.astype(jnp.float32).reshape(-1)
    sums = {CROSS_ENTROPY: weighted_sum(jax.lax.stop_gradient(ours.cross_entropy), weights)}
    if theirs is not None:
        sums[TEACHER_CROSS_ENTROPY] = weighted_sum(theirs.cross_entropy, weights)
    return sums | {term.name: weighted_sum(term.token_loss(ours, theirs, targets), weights) for term in terms}
