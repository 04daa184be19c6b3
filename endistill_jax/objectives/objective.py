"""An objective: the terms that a student is trained with, as plain data, and the loss they add up to.

Sums and weights are each added over micro-batches, devices and hosts before they are divided, once, so that the loss
does not depend on how a batch is cut.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Batch, Output, Reads, union
from endistill_jax.objectives.implementation import DEFAULT, LossImplementation
from endistill_jax.objectives.interpolated_targets import InterpolatedTargets, joined_head
from endistill_jax.objectives.term import ModelShape, Role, Term, TermInputs
from endistill_jax.objectives.token_terms import Sums, TokenTerm, dense_token_sums
from endistill_jax.objectives.tokens_blocked import token_loss

# Metrics of a step that are no term.
RESERVED = ("loss", "cross_entropy", "teacher_cross_entropy", "teacher_share", "gradient_norm", "update_norm")
RESERVED += ("parameter_norm", "learning_rate", "tokens", "step", "timing")
RESERVED_PREFIXES = ("gradient_norm/", "held_out/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """`loss = sum over terms of coefficient(step) * sum / weight`; `validate` checks it against the models."""

    terms: tuple[Term, ...]  # at least one; their names differ
    # How the targets of relations, attention and tokens move from the student's own to the teacher's; None for the
    # teacher's from the first step on.
    interpolated_targets: InterpolatedTargets | None = None

    def __post_init__(self):
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms or not all(isinstance(term, Term) for term in self.terms):
            raise UserError(f"Objective.terms is {self.terms!r}; give at least one term, such as (CrossEntropy(),)")
        for name in self.term_names:
            if self.term_names.count(name) > 1:
                raise UserError(f"Objective.terms has {name!r} twice; give one of them a label of its own")
            if name in RESERVED or name.startswith(RESERVED_PREFIXES):
                raise UserError(f"Objective.terms has {name!r}, which is another metric's name; give it another label")
        for term in self.terms:
            coefficient = term.coefficient
            # Only its fields can tell a manifest, and a plan's process, which function it is.
            fits = dataclasses.is_dataclass(coefficient) if callable(coefficient) else 0 < coefficient < float("inf")
            if not fits:
                advice = "give a finite number above 0 or a Ramp of the step, or leave the term out"
                raise UserError(f"{term.name}: coefficient is {coefficient!r}; {advice}")

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms)

    @property
    def relation_heads(self) -> tuple[int, ...]:
        """Numbers of heads that must divide the inner width of both models."""
        return tuple(sorted({term.relation_heads for term in self.terms if hasattr(term, "relation_heads")}))

    def reads(self, role: Role) -> Reads:
        """What is read of the teacher or of the student."""
        return union(term.reads(role) for term in self.terms if role == "student" or term.needs_teacher)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """The weight of each term by name, float32 scalars, from the masks alone.

        So the normalizer of a whole batch is known before any of its micro-batches has run.
        """
        return {term.name: term.weight(batch) for term in self.terms}

    def coefficients(self, step: jax.Array | None = None) -> dict[str, jax.Array | float]:
        """Each term's coefficient by name, at a step that counts from 0; None is the first."""
        step = jnp.zeros((), jnp.int32) if step is None else step
        given = {term.name: term.coefficient for term in self.terms}
        return {name: each(step) if callable(each) else each for name, each in given.items()}

    def factors(self, weights: Mapping[str, jax.Array], step: jax.Array | None = None) -> dict[str, jax.Array]:
        """What each term's sum is multiplied by in the loss: `coefficient / weight`, or 0 where the weight is 0."""

        def factor(coefficient: jax.Array | float, weight: jax.Array) -> jax.Array:
            empty = weight == 0
            return jnp.where(empty, 0.0, coefficient / jnp.where(empty, 1.0, weight))

        return {name: factor(each, weights[name]) for name, each in self.coefficients(step).items()}

    def init_params(self, key: jax.Array, student: ModelShape, teacher: ModelShape | None) -> dict[str, Any]:
        """By name, the parameters of the terms that own some; boxed where they have logical axes."""
        keys = jax.random.split(key, len(self.terms))
        made = {term.name: term.init_params(key, student, teacher) for term, key in zip(self.terms, keys, strict=True)}
        return {name: params for name, params in made.items() if params is not None}

    def validate(self, student: ModelShape, teacher: ModelShape | None = None) -> None:
        """Checks every term against the models; `teacher` is None where there is none."""
        if self.needs_teacher and teacher is None:
            names = ", ".join(term.name for term in self.terms if term.needs_teacher)
            raise UserError(f"the objective compares the student with a teacher ({names}), but there is none; give one")
        if self.interpolated_targets is not None and not self.needs_teacher:
            raise UserError("Objective.interpolated_targets moves towards a teacher's, but no term reads one")
        for term in self.terms:
            term.validate(student, teacher)

    def described(self) -> dict[str, Any]:
        """Its parts by name, for a manifest: the order of the terms is no part of it."""
        terms = {term.name: term for term in self.terms}
        return {"terms": terms, "interpolated_targets": self.interpolated_targets}


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
        student: everything that the objective reads of it.
        teacher: likewise; a constant. None if no term needs a teacher.
        batch: `decoder_target_tokens`, `decoder_loss_weights` [batch, target], and what `batch_segments` reads.
        weights: `Objective.weights` of the whole batch. With those, the shares of its micro-batches add up to its loss.
        params: the terms' own parameters, by term name.
        share: the teacher's, of interpolated targets; None for its own.
        step: by which scheduled coefficients move; None is the first.
        implementation: dense or blocked, and the mesh.

    Returns:
        The loss, and by name, not yet divided, the sums of the terms and, where distributions over the vocabulary are
        read, `cross_entropy` and `teacher_cross_entropy`, weighted as the tokens: float32 scalars in nats.
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
