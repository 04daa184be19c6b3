"""Losses on arrays and masks. Each returns `(sum, weight)`; the objective adds them up by a path."""

from endistill_jax.losses.cross_entropy import cross_entropy
from endistill_jax.losses.logits_kl import logits_kl
from endistill_jax.losses.objective import coefficients, combine, term_sums, term_weights
from endistill_jax.losses.path import RELATIONS, SITES, Path, Site
from endistill_jax.losses.relations import relation_kl, relation_weight

__all__ = [
    "RELATIONS",
    "SITES",
    "Path",
    "Site",
    "coefficients",
    "combine",
    "cross_entropy",
    "logits_kl",
    "relation_kl",
    "relation_weight",
    "term_sums",
    "term_weights",
]
