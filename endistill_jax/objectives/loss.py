"""The objective: adds up the terms of a path.

`loss = sum over terms of coefficient * sum / weight`. Sums and weights are each added over micro-batches, devices and
hosts before they are divided, once, so that the loss does not depend on how a batch is cut.
"""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from endistill_jax.core.batch import Batch, batch_segments
from endistill_jax.core.outputs import Output, Tap
from endistill_jax.core.sites import row_masks
from endistill_jax.objectives.cross_entropy import cross_entropy
from endistill_jax.objectives.implementation import DEFAULT, Computation
from endistill_jax.objectives.logits_kl import logits_kl
from endistill_jax.objectives.objective import Path, Site
from endistill_jax.objectives.relations import relation_kl, relation_weight
from endistill_jax.objectives.relations_blocked import relation_kl_grouped
from endistill_jax.objectives.vocabulary import vocabulary_loss
from endistill_jax.objectives.vocabulary_tokens import Head

LOGITS = "logits"
LM = "lm"
# Told beside the terms wherever the model reads out words, whether they are in the loss or not.
CROSS_ENTROPY = "cross_entropy"
TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"

_VECTORS = {"q": "query", "k": "key", "v": "value"}


def coefficients(path: Path) -> dict[str, float]:
    """The coefficient of each term of the loss, by the term's name; a site shares its weight among its relations."""
    found = {name: site.weight / len(site.relations) for name, _, site, _ in _relation_terms(path)}
    if path.logits_weight > 0:
        found[LOGITS] = path.logits_weight
    if path.lm_weight > 0:
        found[LM] = path.lm_weight
    return found


def term_weights(path: Path, batch: Batch) -> dict[str, jax.Array]:
    """The weight of each term, float32 scalars, from the masks alone.

    So the normaliser of a whole batch is known before any of its micro-batches has run.

    Args:
      path: which terms there are.
      batch: `decoder_loss_weights` `[batch, target]` and what `batch_segments` reads.

    Returns:
      By term name: rows (relations) or summed loss weights (`logits`, `lm`).
    """
    segments = batch_segments(batch)
    weights = {
        name: relation_weight(**row_masks(site_name, relation, segments)._asdict())
        for name, site_name, _, relation in _relation_terms(path)
    }
    tokens = jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)
    return weights | {name: tokens for name in (LOGITS, LM) if name in coefficients(path)}


def term_sums(path: Path, student: Output, teacher: Output | None, batch: Batch) -> dict[str, jax.Array]:
    """The sum of each term over a batch or micro-batch by the dense forms, each differentiable by itself.

    Args:
      path: which terms there are.
      student: with the taps of the path's sites, and logits if the path needs them.
      teacher: likewise; a constant. May be None if the path needs no teacher.
      batch: `decoder_target_tokens`, `decoder_loss_weights` `[batch, target]` and what `batch_segments` reads.

    Returns:
      By term name, float32 scalars in nats, not yet divided by the term's weight.

    Raises:
      UserError: if relation heads do not divide the inner dimensions, or the vocabularies differ in size.
    """
    dense = Computation(relations="dense")
    sums = _relation_sums(path, student, teacher, batch, dense) | _dense_vocabulary_sums(path, student, teacher, batch)
    return {name: sums[name] for name in coefficients(path)}


def loss_from_outputs(
    path: Path,
    student: Output,
    teacher: Output | None,
    batch: Batch,
    weights: Mapping[str, jax.Array],
    computation: Computation = DEFAULT,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch, or a micro-batch's share of it, and the sums that it is made of.

    Only the loss is differentiable in every form of the losses: `jax.value_and_grad(..., has_aux=True)`.

    Args:
      path: which terms there are.
      student: with the taps of the path's sites, and logits or head if the path needs them.
      teacher: likewise, the same of the two; a constant. May be None if the path needs no teacher.
      batch: `decoder_target_tokens`, `decoder_loss_weights` `[batch, target]` and what `batch_segments` reads.
      weights: `term_weights` of the whole batch. With those, the shares of its micro-batches add up to its loss.
      computation: which form of each loss runs.

    Returns:
      `sum over terms of coefficient * sum / weight`, in which a term of weight 0 adds nothing; and by name, not yet
      divided, the sums of the terms and, where there are words, `cross_entropy` and `teacher_cross_entropy`, whose
      weight is that of the loss weights: float32 scalars in nats.

    Raises:
      UserError: if relation heads do not divide the inner dimensions, or the vocabularies differ in size.
    """
    relations = _relation_sums(path, student, teacher, batch, computation)
    if student.head is None:
        words = _dense_vocabulary_sums(path, student, teacher, batch)
        return combine(path, relations | words, weights), relations | words
    factors = _factors(path, weights)
    loss, sums = vocabulary_loss(
        _head(student),
        _head(teacher),
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
        logits_factor=factors.get(LOGITS),
        lm_factor=factors.get(LM),
        temperature=path.temperature,
        z_loss=path.z_loss,
        computation=computation,
    )
    loss += sum(factors[name] * total for name, total in relations.items())
    words = {LOGITS: sums.logits, LM: sums.lm, CROSS_ENTROPY: sums.cross_entropy}
    words = {name: total for name, total in words.items() if name in factors or name == CROSS_ENTROPY}
    if teacher is not None and teacher.head is not None:
        words[TEACHER_CROSS_ENTROPY] = sums.teacher_cross_entropy
    return loss, relations | words


def combine(path: Path, sums: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> jax.Array:
    """The loss, float32 scalar: `sum over terms of coefficient * sum / weight`; a term of weight 0 adds nothing."""
    return sum((factor * sums[name] for name, factor in _factors(path, weights).items()), jnp.zeros((), jnp.float32))


def _factors(path: Path, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What each term's sum is multiplied by in the loss: `coefficient / weight`, or 0 where the weight is 0."""

    def factor(coefficient: float, weight: jax.Array) -> jax.Array:
        empty = weight == 0
        return jnp.where(empty, 0.0, coefficient / jnp.where(empty, 1.0, weight))

    return {name: factor(coefficient, weights[name]) for name, coefficient in coefficients(path).items()}


def _head(output: Output | None) -> Head | None:
    return None if output is None or output.head is None else Head(output.head.hidden, output.head.kernel)


def _relation_sums(
    path: Path, student: Output, teacher: Output | None, batch: Batch, computation: Computation
) -> dict[str, jax.Array]:
    segments = batch_segments(batch)
    grouped = computation.groups_relations(len(segments.decoder))
    relation_loss = functools.partial(relation_kl_grouped, computation=computation) if grouped else relation_kl
    sums = {}
    for name, site_name, site, relation in _relation_terms(path):
        sums[name], _ = relation_loss(
            _vectors(teacher.taps[site_name, site.teacher_layer], relation),
            _vectors(student.taps[site_name, site.student_layer], relation),
            relation_heads=site.relation_heads,
            **row_masks(site_name, relation, segments)._asdict(),
        )
    return sums


def _dense_vocabulary_sums(path: Path, student: Output, teacher: Output | None, batch: Batch) -> dict[str, jax.Array]:
    sums, weights, targets = {}, batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    if path.logits_weight > 0:
        sums[LOGITS], _ = logits_kl(teacher.logits, student.logits, weights, path.temperature)
    if path.lm_weight > 0:
        sums[LM], _ = cross_entropy(student.logits, targets, weights, path.z_loss)
    for name, output in ((CROSS_ENTROPY, student), (TEACHER_CROSS_ENTROPY, teacher)):
        if output is not None and output.logits is not None:
            sums[name], _ = cross_entropy(jax.lax.stop_gradient(output.logits), targets, weights)
    return sums


def _relation_terms(path: Path) -> Iterator[tuple[str, str, Site, str]]:
    """Yields `(term name, site name, site, relation)` for each relation of a path."""
    for site_name, site in path.sites.items():
        for relation in site.relations:
            yield f"{site_name}/{relation}", site_name, site, relation


def _vectors(tap: Tap, relation: str) -> tuple[jax.Array, jax.Array]:
    first, second = relation
    return getattr(tap, _VECTORS[first]), getattr(tap, _VECTORS[second])
