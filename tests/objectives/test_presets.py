"""The presets are what their table says, and have the names of the paper's methods."""

import pytest

from endistill_jax.objectives import (
    CrossEntropy,
    ForwardKL,
    InterpolatedTargets,
    Objective,
    RelationKL,
    presets,
    relations,
)

SELF, CROSS = {"qq", "kk", "vv"}, {"qk", "vv"}
D, E, X = ("decoder_self", SELF), ("encoder_self", SELF), ("cross", CROSS)

# The paper's name -> the preset, the relations by site, whether token distributions are compared.
PAPER = {
    "MlmKD": (presets.logits(), (), True),
    "MiniLM": (presets.minilm(), (D,), False),
    "MlmKD+MiniLM": (presets.implicit(), (D,), True),
    "MiniEnD-D": (presets.miniend_d(), (D, X), True),
    "MiniEnD-D w/o logits": (presets.miniend_d(with_logits=False), (D, X), False),
    "MiniEnD-E": (presets.miniend_e(), (D, E), True),
    "MiniEnD-E w/o logits": (presets.miniend_e(with_logits=False), (D, E), False),
}
OURS = {"union": (presets.union(), (D, E, X), True), "encoder": (presets.encoder(), (E,), False)}


def parts(objective):
    sites = {}
    for term in objective.terms:
        if isinstance(term, RelationKL):
            sites.setdefault(term.site, set()).add(term.relation)
    return sites, any(isinstance(term, ForwardKL) for term in objective.terms)


@pytest.mark.parametrize("name", PAPER | OURS)
def test_presets_compare_what_their_table_says(name):
    objective, sites, with_logits = (PAPER | OURS)[name]
    assert parts(objective) == (dict(sites), with_logits)
    # Every weight of the paper is 1: a site's relations share it.
    totals = dict.fromkeys(dict(sites), 0.0) | ({"logits": 0.0} if with_logits else {})
    for term, coefficient in objective.coefficients().items():
        totals[term.split("/")[0]] += coefficient
    assert totals == pytest.approx(dict.fromkeys(totals, 1.0))
    layers = {(term.teacher_layer, term.student_layer) for term in objective.terms if isinstance(term, RelationKL)}
    assert layers <= {(-1, -1)}
    assert objective.needs_teacher and objective.reads("student").decoder == (name != "encoder")


def test_scratch_is_the_language_models_own_loss():
    assert presets.scratch(z_loss=1e-4) == Objective(terms=(CrossEntropy(z_loss=1e-4),))
    assert not presets.scratch().needs_teacher


def test_the_union_is_both_directions():
    both = set(presets.miniend_d().term_names) | set(presets.miniend_e().term_names)
    assert set(presets.union().term_names) == both


def test_settings_reach_every_term():
    targets = InterpolatedTargets(steps=5)
    for preset in (presets.implicit, presets.miniend_d, presets.miniend_e, presets.union):
        objective = preset(
            relation_heads=4, teacher_layer=3, student_layer=0, temperature=2.0, interpolated_targets=targets
        )
        assert objective.relation_heads == (4,) and objective.interpolated_targets == targets
        assert {layer for _, layer in objective.reads("teacher").taps} == {3}
        assert {layer for _, layer in objective.reads("student").taps} == {0}
        assert [term.temperature for term in objective.terms if isinstance(term, ForwardKL)] == [2.0]


def test_any_terms_can_be_put_together_with_tuples_among_them():
    mixed = presets.objective(terms=(relations("cross", ("qk",)), CrossEntropy()))
    assert mixed.term_names == ("cross/qk", "lm")
