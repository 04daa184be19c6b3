"""Losses on arrays and masks. Each returns `(sum, weight)`; the objective adds them up by a path."""

from endistill_jax.losses.computation import Computation, Placement
from endistill_jax.losses.cross_entropy import cross_entropy
from endistill_jax.losses.interpolated_targets import InterpolatedTargets, interpolate_output
from endistill_jax.losses.logits_kl import logits_kl
from endistill_jax.losses.objective import coefficients, combine, loss_from_outputs, term_sums, term_weights
from endistill_jax.losses.path import RELATIONS, SITES, Path, Site
from endistill_jax.losses.relations import relation_kl, relation_weight
from endistill_jax.losses.relations_grouped import relation_kl_grouped
from endistill_jax.losses.vocabulary import vocabulary_loss
from endistill_jax.losses.vocabulary_tokens import Head, VocabularySums

__all__ = [
    "RELATIONS",
    "SITES",
    "Computation",
    "Head",
    "InterpolatedTargets",
    "Path",
    "Placement",
    "Site",
    "VocabularySums",
    "coefficients",
    "combine",
    "cross_entropy",
    "logits_kl",
    "interpolate_output",
    "loss_from_outputs",
    "relation_kl",
    "relation_kl_grouped",
    "relation_weight",
    "term_sums",
    "term_weights",
    "vocabulary_loss",
]
