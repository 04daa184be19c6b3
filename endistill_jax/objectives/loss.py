"""The loss of an objective: adds up its terms.

Sums and weights are each added over micro-batches, devices and hosts before they are divided, once, so that the loss
does not depend on how a batch is cut.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.batch import Batch
from endistill_jax.core.outputs import Output
from endistill_jax.objectives.implementation import DEFAULT, LossImplementation
from endistill_jax.objectives.interpolated_targets import joined_head
from endistill_jax.objectives.objective import Objective
from endistill_jax.objectives.term import TermInputs
from endistill_jax.objectives.token_term import Sums, TokenTerm, dense_token_sums
from endistill_jax.objectives.tokens_blocked import token_loss


def loss_and_sums(
    objective: Objective,
    student: Output,
    teacher: Output | None,
    batch: Batch,
    weights: Mapping[str, Float[Array, ""]],
    *,
    params: Mapping[str, Any] | None = None,
    share: Float[Array, ""] | None = None,
    step: Int[Array, ""] | None = None,
    implementation: LossImplementation = DEFAULT,
) -> tuple[Float[Array, ""], Sums]:
    """The loss of a batch, or a micro-batch's share of it, and the sums that it is made of.

    Only the loss is differentiable in every form: `jax.value_and_grad(..., has_aux=True)`.

    Args:
        objective: its terms.
        student: with everything that the objective reads of it.
        teacher: likewise; a constant. May be None if no term needs a teacher.
        batch: `decoder_target_tokens`, `decoder_loss_weights` [batch, target], and what `batch_segments` reads.
        weights: `Objective.weights` of the whole batch. With those, the shares of its micro-batches add up to its loss.
        params: the terms' own parameters, by term name.
        share: the teacher's, of interpolated targets; None for the teacher's own.
        step: by which scheduled coefficients move; None is the first.
        implementation: dense or blocked, and the mesh.

    Returns:
        The loss, in which a term of weight 0 adds nothing; and by name, not yet divided, the sums of the terms and,
        where distributions over the vocabulary are read, `cross_entropy` and `teacher_cross_entropy`, whose weight is
        that of the loss weights: float32 scalars in nats.
    """
    teacher = jax.lax.stop_gradient(teacher)
    if share is not None and teacher.head is not None and student.head is not None:
        teacher = teacher._replace(head=joined_head(teacher.head, student.head, share))
    factors = objective.factors(weights, step)
    loss, sums = jnp.zeros((), jnp.float32), {}
    for term in objective.terms:
        if not isinstance(term, TokenTerm):
            sums[term.name] = term.sum(
                TermInputs(
                    student=student,
                    teacher=teacher,
                    batch=batch,
                    params=(params or {}).get(term.name),
                    share=share,
                    implementation=implementation,
                )
            )
            loss += factors[term.name] * sums[term.name]
    if student.head is None:
        return loss, sums
    # The token terms together: they share the logits.
    terms = [term for term in objective.terms if isinstance(term, TokenTerm)]
    heads = student.head, None if teacher is None else teacher.head
    tokens = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    if terms and implementation.blocks("vocabulary", len(student.head.hidden)):
        of_tokens, token_sums = token_loss(terms, *heads, *tokens, factors, implementation)
    else:
        token_sums = dense_token_sums(terms, *heads, *tokens)
        of_tokens = sum(factors[term.name] * token_sums[term.name] for term in terms)
    return loss + of_tokens, sums | token_sums
