"""Objectives by name.

From the MiniEnD paper (Zhang et al., arXiv 2305.12330) and its poster, every weight 1: `scratch`, `logits` (its MlmKD),
`minilm` (its MiniLM), `implicit` (MlmKD+MiniLM), `miniend_d` and `miniend_e` with and without logits. Ours is `union`,
both directions of MiniEnD at once. Which relations a site has and how many relation heads is not known of the paper
and is ours everywhere: `qq kk vv` for self-attention, `qk vv` for cross-attention, of the last layers.

    preset        decoder_self    encoder_self    cross    logits
    scratch                                                          the language model's own loss
    logits                                                 x
    minilm        x
    implicit      x                                        x
    miniend_d     x                               x        x         explicit, through the cross-attention
    miniend_e     x               x                        x         explicit, through the encoder's self-attention
    union         x               x               x        x
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.interpolated_targets import InterpolatedTargets
from endistill_jax.objectives.objective import Objective
from endistill_jax.objectives.relations import RelationKL, relations
from endistill_jax.objectives.term import Term
from endistill_jax.objectives.token_terms import CrossEntropy, ForwardKL

SELF = ("qq", "kk", "vv")
CROSS = ("qk", "vv")
RELATIONS_OF_SITE = {"decoder_self": SELF, "encoder_self": SELF, "cross": CROSS}


def scratch(*, z_loss: float = 0.0) -> Objective:
    """The language model's own loss, without a teacher."""
    return Objective(terms=(CrossEntropy(z_loss=z_loss),))


def logits(*, temperature: float = 1.0, interpolated_targets: InterpolatedTargets | None = None) -> Objective:
    """The paper's MlmKD: token distributions alone."""
    return Objective(terms=(ForwardKL(temperature=temperature),), interpolated_targets=interpolated_targets)


def minilm(
    *,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
    interpolated_targets: InterpolatedTargets | None = None,
) -> Objective:
    """The paper's MiniLM: the decoder's self-attention alone (that it is the decoder's is inferred)."""
    terms = _relations(relation_heads, teacher_layer, student_layer, "decoder_self")
    return Objective(terms=terms, interpolated_targets=interpolated_targets)


def implicit(
    *,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
    temperature: float = 1.0,
    interpolated_targets: InterpolatedTargets | None = None,
) -> Objective:
    """The paper's MlmKD+MiniLM: token distributions and the decoder's self-attention."""
    terms = _relations(relation_heads, teacher_layer, student_layer, "decoder_self")
    return Objective(terms=(*terms, ForwardKL(temperature=temperature)), interpolated_targets=interpolated_targets)


def miniend_d(
    *,
    with_logits: bool = True,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
    temperature: float = 1.0,
    interpolated_targets: InterpolatedTargets | None = None,
) -> Objective:
    """The paper's MiniEnD-D: the decoder's self-attention and its attention to the encoder."""
    terms = _relations(relation_heads, teacher_layer, student_layer, "decoder_self", "cross")
    terms += (ForwardKL(temperature=temperature),) if with_logits else ()
    return Objective(terms=terms, interpolated_targets=interpolated_targets)


def miniend_e(
    *,
    with_logits: bool = True,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
    temperature: float = 1.0,
    interpolated_targets: InterpolatedTargets | None = None,
) -> Objective:
    """The paper's MiniEnD-E: the self-attention of the decoder and of the encoder."""
    terms = _relations(relation_heads, teacher_layer, student_layer, "decoder_self", "encoder_self")
    terms += (ForwardKL(temperature=temperature),) if with_logits else ()
    return Objective(terms=terms, interpolated_targets=interpolated_targets)


def union(
    *,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
    temperature: float = 1.0,
    interpolated_targets: InterpolatedTargets | None = None,
) -> Objective:
    """Ours: all three sites and the token distributions, MiniEnD-D and MiniEnD-E together."""
    terms = _relations(relation_heads, teacher_layer, student_layer, "encoder_self", "decoder_self", "cross")
    return Objective(terms=(*terms, ForwardKL(temperature=temperature)), interpolated_targets=interpolated_targets)


def encoder(
    *,
    relation_heads: int = 16,
    teacher_layer: int = -1,
    student_layer: int = -1,
    interpolated_targets: InterpolatedTargets | None = None,
) -> Objective:
    """Ours, for models that are an encoder alone: the encoder's self-attention."""
    terms = _relations(relation_heads, teacher_layer, student_layer, "encoder_self")
    return Objective(terms=terms, interpolated_targets=interpolated_targets)


def objective(*, terms: tuple[Term, ...], interpolated_targets: InterpolatedTargets | None = None) -> Objective:
    """Any terms; a tuple among them, such as `relations(...)` gives, counts as its members."""
    flat = tuple(each for term in terms for each in (term if isinstance(term, tuple) else (term,)))
    return Objective(terms=flat, interpolated_targets=interpolated_targets)


def build(preset: str | Callable[..., Objective], *, relation_heads: int = 16, **settings: Any) -> Objective:
    """A preset, by its name or as one of the functions above; the relation heads are for those that have relations."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            near = difflib.get_close_matches(preset, PRESETS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PRESETS)}"
            raise UserError(f"no objective {preset!r}; {advice}")
        preset = PRESETS[preset]
    if not callable(preset):
        raise UserError(
            f"a preset is a name or a function, such as presets.union without (), and not {type(preset).__name__}; "
            "an objective that is made already is jobs.Experiment.objective itself"
        )
    if "relation_heads" in inspect.signature(preset).parameters:
        settings["relation_heads"] = relation_heads
    return preset(**settings)


def _relations(relation_heads: int, teacher_layer: int, student_layer: int, *sites: str) -> tuple[RelationKL, ...]:
    layers = {"teacher_layer": teacher_layer, "student_layer": student_layer}
    of_sites = (relations(site, RELATIONS_OF_SITE[site], relation_heads=relation_heads, **layers) for site in sites)
    return tuple(term for terms in of_sites for term in terms)


PRESETS = {each.__name__: each for each in (scratch, logits, minilm, implicit, miniend_d, miniend_e, union, encoder)}
