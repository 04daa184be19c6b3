"""Losses on arrays and masks. Each returns `(sum, weight)`; the objective adds them up by a path."""

from endistill_jax.objectives.cross_entropy import cross_entropy
from endistill_jax.objectives.implementation import Computation, Placement
from endistill_jax.objectives.interpolated_targets import InterpolatedTargets, interpolate_output
from endistill_jax.objectives.logits_kl import logits_kl
from endistill_jax.objectives.loss import coefficients, combine, loss_from_outputs, term_sums, term_weights
from endistill_jax.objectives.objective import RELATIONS, SITES, Path, Site
from endistill_jax.objectives.relations import relation_kl, relation_weight
from endistill_jax.objectives.relations_blocked import relation_kl_grouped
from endistill_jax.objectives.vocabulary import vocabulary_loss
from endistill_jax.objectives.vocabulary_tokens import Head, VocabularySums

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
