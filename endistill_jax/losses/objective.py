"""The objective: adds up the terms of a path.

`loss = sum over terms of coefficient * sum / weight`. Sums and weights are each added over micro-batches, devices and
hosts before they are divided, once, so that the loss does not depend on how a batch is cut.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from endistill_jax.batch import Batch, Segments, batch_segments
from endistill_jax.losses.cross_entropy import cross_entropy
from endistill_jax.losses.logits_kl import logits_kl
from endistill_jax.losses.path import Path, Site
from endistill_jax.losses.relations import relation_kl, relation_weight

LOGITS = "logits"
LM = "lm"

_VECTORS = {"q": "query", "k": "key", "v": "value"}


class Tap(Protocol):
    """Vectors of one attention module, each `[batch, length, inner]`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


class Output(Protocol):
    """What a model returns: the taps by site name, and `[batch, target, vocabulary]` logits if computed."""

    taps: Mapping[str, Tap]
    logits: jax.Array | None


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
        name: relation_weight(**_row_masks(site_name, relation, segments))
        for name, site_name, _, relation in _relation_terms(path)
    }
    tokens = jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)
    return weights | {name: tokens for name in (LOGITS, LM) if name in coefficients(path)}


def term_sums(path: Path, student: Output, teacher: Output | None, batch: Batch) -> dict[str, jax.Array]:
    """The sum of each term over a batch or micro-batch, float32 scalars in nats, not yet divided by its weight.

    Args:
      path: which terms there are.
      student: with the taps of the path's sites, and logits if the path needs them.
      teacher: likewise; a constant. May be None if the path needs no teacher.
      batch: `decoder_target_tokens`, `decoder_loss_weights` `[batch, target]` and what `batch_segments` reads.

    Raises:
      UserError: if relation heads do not divide the inner dimensions, or the vocabularies differ in size.
    """
    segments = batch_segments(batch)
    sums = {}
    for name, site_name, site, relation in _relation_terms(path):
        sums[name], _ = relation_kl(
            _vectors(teacher.taps[site_name], relation),
            _vectors(student.taps[site_name], relation),
            relation_heads=site.relation_heads,
            **_row_masks(site_name, relation, segments),
        )
    loss_weights = batch["decoder_loss_weights"]
    if path.logits_weight > 0:
        sums[LOGITS], _ = logits_kl(teacher.logits, student.logits, loss_weights, path.temperature)
    if path.lm_weight > 0:
        sums[LM], _ = cross_entropy(student.logits, batch["decoder_target_tokens"], loss_weights, path.z_loss)
    return sums


def combine(path: Path, sums: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]) -> jax.Array:
    """The loss, float32 scalar: `sum over terms of coefficient * sum / weight`; a term of weight 0 adds nothing.

    With the sums of one micro-batch and the weights of the whole batch it is that micro-batch's share of the loss:
    shares, and their gradients, add up to the whole batch's.
    """
    loss = jnp.zeros((), jnp.float32)
    for name, coefficient in coefficients(path).items():
        empty = weights[name] == 0
        # The divisor is replaced as well as the quotient: the gradient of the branch not taken must be finite.
        loss += coefficient * jnp.where(empty, 0.0, sums[name] / jnp.where(empty, 1.0, weights[name]))
    return loss


def _relation_terms(path: Path) -> Iterator[tuple[str, str, Site, str]]:
    """Yields `(term name, site name, site, relation)` for each relation of a path."""
    for site_name, site in path.sites.items():
        for relation in site.relations:
            yield f"{site_name}/{relation}", site_name, site, relation


def _vectors(tap: Tap, relation: str) -> tuple[jax.Array, jax.Array]:
    first, second = relation
    return getattr(tap, _VECTORS[first]), getattr(tap, _VECTORS[second])


def _row_masks(site_name: str, relation: str, segments: Segments) -> dict[str, jax.Array | bool]:
    """The mask arguments of a relation: which side of the batch each of its two sets of vectors is from."""

    def side(vector: str) -> jax.Array:
        of_decoder = site_name == "decoder_self" or (site_name == "cross" and vector == "q")
        return segments.decoder if of_decoder else segments.encoder

    first, second = relation
    return {"query_segments": side(first), "key_segments": side(second), "causal": site_name == "decoder_self"}
