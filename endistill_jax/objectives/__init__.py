"""Objectives: terms on arrays and masks, added up into a loss. Knows arrays, not models."""

from endistill_jax.objectives.attention import AttentionKL
from endistill_jax.objectives.hidden import HiddenDistance
from endistill_jax.objectives.implementation import LossImplementation, MeshAxes
from endistill_jax.objectives.interpolated_targets import InterpolatedTargets
from endistill_jax.objectives.objective import Objective, loss_and_sums
from endistill_jax.objectives.relations import RelationKL, relations
from endistill_jax.objectives.term import Ramp, Term, TermInputs
from endistill_jax.objectives.token_terms import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL, SkewedKL, TokenTerm

__all__ = [
    "AttentionKL",
    "CrossEntropy",
    "ForwardKL",
    "GeneralizedJSD",
    "HiddenDistance",
    "InterpolatedTargets",
    "LossImplementation",
    "MeshAxes",
    "Objective",
    "Ramp",
    "RelationKL",
    "ReverseKL",
    "SkewedKL",
    "Term",
    "TermInputs",
    "TokenTerm",
    "loss_and_sums",
    "relations",
]
