"""An objective depends on the examples only: not on how they are padded, packed, cut into micro-batches or computed.

Examples are made once, as vectors per token, and laid out in batches in different ways. All terms of the package are in
one objective, so that whatever is shown of it is shown of each.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.attention import SITES, row_masks
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Head, Output, Tap, batch_segments
from endistill_jax.objectives import (
    AttentionKL,
    CrossEntropy,
    ForwardKL,
    GeneralizedJSD,
    HiddenDistance,
    LossImplementation,
    Objective,
    Ramp,
    RelationKL,
    ReverseKL,
    SkewedKL,
    TokenTerm,
    loss_and_sums,
    relations,
)
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.objectives.relations import RELATIONS, relation_kl

LENGTHS = ((4, 3), (0, 2), (2, 5), (5, 1))  # (source, target) of each example; the second has an empty source
VOCABULARY, HEADS, LONGEST = 5, 4, 10
INNER_DIM = {"teacher": 12, "student": 8}
D_MODEL = {"teacher": 7, "student": 6}

EVERYTHING = Objective(
    terms=(
        *relations("encoder_self", ("qq", "vv"), coefficient=0.5, relation_heads=4),
        *relations("decoder_self", ("qk", "vv"), relation_heads=4),
        *relations("cross", RELATIONS, coefficient=2.0, relation_heads=2),
        *(AttentionKL(site=site, num_heads=HEADS) for site in ("encoder_self", "decoder_self", "cross")),
        HiddenDistance(of="encoded"),
        HiddenDistance(of="encoder", distance="l2"),
        HiddenDistance(of="decoder", coefficient=0.4),
        ForwardKL(coefficient=0.7, temperature=2.0),
        ReverseKL(),
        GeneralizedJSD(beta=0.3),
        SkewedKL(temperature=3.0),
        CrossEntropy(coefficient=0.3, z_loss=0.01),
    )
)
OF_TEACHER = Objective(terms=tuple(term for term in EVERYTHING.terms if term.needs_teacher))

# The vectors of a token, leaves naming the side of the batch that they are of.
SIDES = {
    "taps": {
        "encoder_self": ("source",) * 3,
        "decoder_self": ("target",) * 3,
        "cross": ("target", "source", "source"),
    },
    "hidden": {"encoder": "source", "decoder": "target"},
    "encoded": "source",
    "last": "target",
}


@functools.cache
def _vectors(model):
    """Of each example, arrays [length, width] in the shape of `SIDES`."""
    rng = np.random.default_rng({"teacher": 0, "student": 1}[model])

    def example(lengths):
        by_side = dict(zip(("source", "target"), lengths, strict=True))

        def draw(path, side):
            width = INNER_DIM[model] if path[0].key == "taps" else D_MODEL[model]
            return rng.standard_normal((by_side[side], width)).astype(np.float32)

        return jax.tree_util.tree_map_with_path(draw, SIDES)

    return [example(lengths) for lengths in LENGTHS]


@functools.cache
def _whole(model):
    """What is no token's: the head, and a bias for every distance of positions."""
    rng = np.random.default_rng({"teacher": 3, "student": 4}[model])
    bias = {site: rng.standard_normal((HEADS, 2 * LONGEST)).astype(np.float32) for site in SITES if site != "cross"}
    return {"kernel": rng.standard_normal((D_MODEL[model], VOCABULARY)).astype(np.float32), "bias": bias}


def _own_params():
    rng = np.random.default_rng(6)
    kernel = (D_MODEL["student"], D_MODEL["teacher"])
    names = [term.name for term in EVERYTHING.terms if isinstance(term, HiddenDistance)]
    return {name: {"kernel": rng.standard_normal(kernel).astype(np.float32)} for name in names}


def _output(vectors, whole):
    def tap(site):
        query, key, value = vectors["taps"][site]
        if site == "cross":
            return Tap(query, key, value)
        distance = jnp.arange(key.shape[1]) - jnp.arange(query.shape[1])[:, None] + LONGEST
        return Tap(query, key, value, whole["bias"][site][:, distance][None])

    return Output(
        encoded=vectors["encoded"],
        head=Head(vectors["last"], whole["kernel"]),
        taps={(site, -1): tap(site) for site in SITES},
        hidden={(stack, -1): states for stack, states in vectors["hidden"].items()},
    )


@functools.cache
def _tokens():
    """Tokens and loss weights of each example; some real tokens have a loss weight of zero or a half."""
    rng = np.random.default_rng(2)
    return [
        {
            "encoder_input_tokens": rng.integers(1, VOCABULARY, source),
            "decoder_target_tokens": rng.integers(1, VOCABULARY, target),
            "decoder_loss_weights": rng.choice([0.0, 0.5, 1.0], target),
        }
        for source, target in LENGTHS
    ]


class Layout(NamedTuple):
    """Which examples are in each row, and how long the rows are."""

    rows: tuple[tuple[int, ...], ...]
    source: int
    target: int

    def places(self, side):
        """Yields (example, row, slice of the row) of one side."""
        for row, examples in enumerate(self.rows):
            start = 0
            for example in examples:
                end = start + LENGTHS[example][("source", "target").index(side)]
                yield example, row, slice(start, end)
                start = end

    def lay_out(self, side, pieces, fill=0):
        """Joins arrays of single examples, [length, ...], to one [row, row length, ...]."""
        array = np.full((len(self.rows), getattr(self, side), *pieces[0].shape[1:]), fill, pieces[0].dtype)
        for example, row, where in self.places(side):
            array[row, where] = pieces[example]
        return array

    def take_apart(self, side, array):
        """The reverse of lay_out: by example."""
        return {example: np.asarray(array)[row, where] for example, row, where in self.places(side)}

    def vectors(self, model, fill=0.0):
        return jax.tree.map(lambda side, *pieces: self.lay_out(side, pieces, fill), SIDES, *_vectors(model))

    def models(self, fill=0.0):
        """What a loss is differentiated by, and the teacher."""
        trained = self.vectors("student", fill), _whole("student"), _own_params()
        return trained, (self.vectors("teacher", fill), _whole("teacher"))

    def batch(self):
        batch = {
            name: self.lay_out("source" if name.startswith("encoder") else "target", [t[name] for t in _tokens()])
            for name in _tokens()[0]
        }
        batch = {name: x.astype(np.float32 if "weights" in name else np.int32) for name, x in batch.items()}
        if all(len(examples) <= 1 for examples in self.rows):
            return batch
        numbers = {example: i for examples in self.rows for i, example in enumerate(examples, start=1)}
        for stack, side, k in (("encoder", "source", 0), ("decoder", "target", 1)):
            ids = [np.full(lengths[k], numbers[example], np.int32) for example, lengths in enumerate(LENGTHS)]
            batch[f"{stack}_segment_ids"] = self.lay_out(side, ids)
        return batch


TIGHT = Layout(((0,), (1,), (2,), (3,)), source=5, target=5)
PADDED = Layout(((0,), (1,), (2,), (3,)), source=9, target=7)
PACKED = Layout(((0, 1), (3, 2)), source=8, target=7)


@functools.partial(jax.jit, static_argnames=("objective", "implementation"))
def _run(trained, teacher, batch, weights, *, objective=EVERYTHING, implementation=DENSE, share=None, step=None):
    """Loss, sums, gradient by (vectors, head and bias, terms' parameters) and by the teacher."""

    def loss(trained, teacher):
        student, own = _output(*trained[:2]), trained[2]
        settings = {"params": own, "share": share, "step": step, "implementation": implementation}
        return loss_and_sums(objective, student, _output(*teacher), batch, weights, **settings)

    (value, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trained, teacher)
    return value, sums, *gradients


@functools.cache
def _of_layout(layout, fill=0.0):
    batch = layout.batch()
    weights = EVERYTHING.weights(batch)
    return *_run(*layout.models(fill), batch, weights), weights


def _relative_error(actual, expected):
    """Of a whole array, by its length: single numbers of a gradient may cancel to anything."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


# --- the examples alone decide ---


@pytest.mark.parametrize("fill", [0.0, np.nan, -np.inf])
@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
def test_loss_and_gradient_do_not_depend_on_padding_its_values_and_packing(layout, fill):
    loss, sums, gradient, _, weights = _of_layout(layout, fill)
    expected_loss, expected_sums, expected, _, expected_weights = _of_layout(TIGHT)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert {k: float(v) for k, v in weights.items()} == {k: float(v) for k, v in expected_weights.items()}
    for name in expected_sums:
        np.testing.assert_allclose(sums[name], expected_sums[name], rtol=1e-5, err_msg=name)

    def compare(side, actual, expected):
        actual, expected = layout.take_apart(side, actual), TIGHT.take_apart(side, expected)
        for example in range(len(LENGTHS)):
            np.testing.assert_allclose(actual[example], expected[example], rtol=1e-4, atol=1e-6)
        assert any(np.any(x) for x in expected.values())

    jax.tree.map(compare, SIDES, gradient[0], expected[0])
    for ours, theirs in zip(jax.tree.leaves(gradient[1:]), jax.tree.leaves(expected[1:]), strict=True):
        assert np.any(theirs) and _relative_error(ours, theirs) < 1e-5


def test_packing_without_segment_ids_is_another_loss():
    batch = {name: x for name, x in PACKED.batch().items() if "segment" not in name}
    # Else the test of packing would show nothing.
    loss = _run(*PACKED.models(), batch, EVERYTHING.weights(batch))[0]
    assert abs(loss - _of_layout(TIGHT)[0]) > 0.01


def test_micro_batches_add_up_by_the_weights_of_the_whole_batch_and_not_as_means():
    (vectors, *rest), (teacher, whole), batch = *TIGHT.models(), TIGHT.batch()
    loss, sums, gradient, _, weights = _of_layout(TIGHT)

    def part(rows):
        cut = functools.partial(jax.tree.map, lambda x: x[rows])
        return *_run((cut(vectors), *rest), (cut(teacher), whole), cut(batch), weights), EVERYTHING.weights(cut(batch))

    parts = [part(slice(0, 1)), part(slice(1, 4))]
    np.testing.assert_allclose(sum(each[0] for each in parts), loss, rtol=1e-5)
    for name in sums:
        np.testing.assert_allclose(sum(each[1][name] for each in parts), sums[name], rtol=1e-5)
    by_vectors = jax.tree.map(lambda *cuts: np.concatenate(cuts), *(each[2][0] for each in parts))
    added = jax.tree.map(lambda *cuts: sum(cuts), *(each[2][1:] for each in parts))
    for ours, theirs in zip(*map(jax.tree.leaves, ((by_vectors, *added), gradient)), strict=True):
        assert _relative_error(ours, theirs) < 1e-5
    for name in EVERYTHING.term_names:
        of_means = np.mean([each[1][name] / each[4][name] for each in parts])
        assert abs(of_means - sums[name] / weights[name]) > 1e-4, name


def test_a_batch_of_nothing_but_padding_has_loss_zero_and_no_gradient():
    empty = jax.tree.map(np.zeros_like, PACKED.batch())
    trained, teacher = PACKED.models()
    spoilt = jax.tree.map(lambda x: x + np.float32(np.nan), (trained[0], teacher[0]))
    weights = EVERYTHING.weights(empty)
    assert not any(float(weight) for weight in weights.values())
    for implementation in (DENSE, LossImplementation()):
        run = functools.partial(_run, implementation=implementation)
        loss, _, *gradients = run((spoilt[0], *trained[1:]), (spoilt[1], teacher[1]), empty, weights)
        assert float(loss) == 0.0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


# --- every form computes the same ---

FORMS = {
    "blocked": LossImplementation(relations="blocked", vocabulary="blocked"),
    "small blocks": LossImplementation(relation_bytes=300, vocabulary_bytes=200),
}


@pytest.mark.parametrize(
    ("form", "layout", "share"),
    [("blocked", TIGHT, None), ("small blocks", PACKED, None), ("small blocks", PACKED, 0.4)],
    ids=["unpacked", "packed", "interpolated"],
)
def test_blocked_forms_equal_the_dense_one(form, layout, share):
    models, batch = layout.models(fill=0.5), layout.batch()
    run = functools.partial(_run, *models, batch, EVERYTHING.weights(batch), share=share)
    expected_loss, expected_sums, expected, _ = run()
    loss, sums, gradient, by_teacher = run(implementation=FORMS[form])
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert sums.keys() == expected_sums.keys() == {*EVERYTHING.term_names, "cross_entropy", "teacher_cross_entropy"}
    for name, total in expected_sums.items():
        np.testing.assert_allclose(sums[name], total, rtol=2e-6, atol=1e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert np.any(theirs) and np.isfinite(ours).all() and _relative_error(ours, theirs) < 2e-6
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_teacher))


# --- what is added up ---


def test_relation_terms_are_the_dense_losses_on_the_sides_and_masks_of_their_sites():
    (student, *_), (teacher, _) = PACKED.models()
    _, sums, *_, weights = _of_layout(PACKED)
    segments = batch_segments(PACKED.batch())
    heads = dict(zip(SITES, (4, 4, 2), strict=True))
    sources, targets = (sum(column) for column in zip(*LENGTHS, strict=True))
    with_source = sum(target for source, target in LENGTHS if source)
    rows = {"encoder_self": sources, "decoder_self": targets, "cross": sources}
    for term in EVERYTHING.terms:
        if isinstance(term, RelationKL):
            site, relation = term.site, term.relation
            pairs = [[x["taps"][site]["qkv".index(letter)] for letter in relation] for x in (teacher, student)]
            masks = row_masks(site, relation, segments)
            np.testing.assert_allclose(sums[f"{site}/{relation}"], relation_kl(*pairs, heads[site], masks), rtol=1e-5)
            queries = {"qq": targets, "qk": with_source}.get(relation, rows[site]) if site == "cross" else rows[site]
            assert float(weights[f"{site}/{relation}"]) == queries
    assert float(weights["hidden/encoded"]) == sources and float(weights["hidden/decoder"]) == targets
    tokens = sum(example["decoder_loss_weights"].sum() for example in _tokens())
    assert float(weights["logits"]) == float(weights["lm"]) == tokens != targets


def test_loss_is_the_sum_of_the_terms_means_by_their_coefficients():
    loss, sums, *_, weights = _of_layout(TIGHT)
    coefficients = EVERYTHING.coefficients()
    assert coefficients["encoder_self/qq"] == 0.5 / 2 and coefficients["cross/vv"] == 2 / 4
    expected = sum(each * float(sums[name]) / float(weights[name]) for name, each in coefficients.items())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_coefficients_move_with_the_step():
    moving = Objective(terms=(ForwardKL(coefficient=Ramp(start=0.2, end=1.0, steps=4)), CrossEntropy()))
    batch = TIGHT.batch()
    weights = moving.weights(batch)
    for implementation in (DENSE, LossImplementation()):
        run = functools.partial(_run, *TIGHT.models(), batch, weights, objective=moving, implementation=implementation)
        for step, coefficient in ((0, 0.2), (1, 0.4), (4, 1.0), (9, 1.0)):
            loss, sums, *_ = run(step=jnp.int32(step))
            expected = coefficient * sums["logits"] / weights["logits"] + sums["lm"] / weights["lm"]
            np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert moving.coefficients()["logits"] == pytest.approx(0.2)


def test_a_term_of_weight_zero_adds_nothing():
    batch = TIGHT.batch() | {"decoder_loss_weights": np.zeros_like(TIGHT.batch()["decoder_loss_weights"])}
    weights = EVERYTHING.weights(batch)
    assert float(weights["logits"]) == 0
    loss, sums, gradient, _ = _run(*TIGHT.models(), batch, weights)
    others = sum(
        each * float(sums[name]) / float(weights[name])
        for name, each in EVERYTHING.coefficients().items()
        if float(weights[name])
    )
    np.testing.assert_allclose(loss, others, rtol=1e-5)
    assert not np.any(gradient[1]["kernel"]) and not np.any(gradient[0]["last"])


def test_loss_is_zero_and_flat_where_the_student_equals_the_teacher():
    _, (vectors, whole) = PACKED.models()
    batch = PACKED.batch()
    own = {name: {"kernel": np.eye(D_MODEL["teacher"], dtype=np.float32)} for name in _own_params()}
    weights = OF_TEACHER.weights(batch)
    loss, sums, (by_vectors, by_whole, _), _ = _run(
        (vectors, whole, own), (vectors, whole), batch, weights, objective=OF_TEACHER
    )
    assert abs(loss) < 1e-5
    assert all(abs(sums[name]) < 1e-5 * weights[name] for name in OF_TEACHER.term_names)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves((by_vectors, by_whole))) < 2e-6


def test_several_layers_of_one_site_are_terms_of_their_own():
    deep = Objective(
        terms=tuple(
            term
            for layers in ((-1, -1), (3, 0), (5, 1))
            for term in relations(
                "cross", ("qk", "vv"), relation_heads=2, teacher_layer=layers[0], student_layer=layers[1]
            )
        )
    )
    assert deep.term_names == ("cross/qk", "cross/vv", "cross/qk@3:0", "cross/vv@3:0", "cross/qk@5:1", "cross/vv@5:1")
    assert deep.reads("teacher").taps == {("cross", layer): "kqv" for layer in (-1, 3, 5)}
    assert deep.reads("student").taps == {("cross", layer): "kqv" for layer in (-1, 0, 1)}


# --- what it asks of the models, and what is refused ---


class Dimensions(NamedTuple):
    vocab_size: int = 100
    d_model: int = 8
    num_heads: int = 3
    inner_dim: int = 12
    depths: tuple[int, int] = (2, 1)

    def depth(self, stack):
        return self.depths[stack == "decoder"]


STUDENT, TEACHER = Dimensions(), Dimensions(d_model=16, num_heads=6, inner_dim=24, depths=(4, 6))


def test_it_asks_for_no_more_than_it_compares():
    encoder = Objective(terms=relations("encoder_self", ("qq",), relation_heads=4, teacher_layer=-3, student_layer=1))
    assert encoder.needs_teacher and encoder.reads("teacher").taps == {("encoder_self", -3): "q"}
    assert not encoder.reads("student").head and not encoder.reads("student").decoder
    scratch = Objective(terms=(CrossEntropy(),))
    scratch.validate(STUDENT)
    assert not scratch.needs_teacher and scratch.reads("student").head and not scratch.reads("teacher").head
    assert Objective(terms=(ForwardKL(),)).reads("teacher").head


def test_objectives_are_hashable_so_that_compiled_functions_can_depend_on_them():
    assert len({EVERYTHING, Objective(terms=EVERYTHING.terms), OF_TEACHER}) == 2


def _cross(**changes):
    return lambda: Objective(terms=relations("cross", ("qk",), **{"relation_heads": 6} | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_cross(relation_heads=5), "cross/qk: relation_heads is 5, .*choose one of 1, 2, 3, 4, 6, 12$"),
        (_cross(relation_heads=0), "cross/qk: relation_heads is 0, .*choose one of 1, 2, 3, 4, 6, 12$"),
        (_cross(teacher_layer=6), "layer 6 of cross/qk.* in the teacher does not exist"),
        (_cross(student_layer=-2), "layer -2 of cross/qk.* in the student does not exist"),
        (lambda: Objective(terms=relations("cross", ("qv",))), "RelationKL.relation is 'qv'; choose one of qq"),
        (lambda: Objective(terms=relations("crossed", ("qk",))), "site is 'crossed'; choose one of encoder_self"),
        (lambda: Objective(terms=(AttentionKL(site="cross", num_heads=3),)), "compared head by head"),
        (lambda: Objective(terms=(HiddenDistance(project=False),)), "width is 16 .*student's 8.*projection"),
        (lambda: Objective(terms=(HiddenDistance(of="head"),)), "HiddenDistance.of is 'head'; choose"),
        (lambda: Objective(terms=(HiddenDistance(of="decoder", student_layer=3),)), "layer 3 .*student does not exist"),
        (lambda: Objective(terms=()), "give at least one term"),
        (lambda: Objective(terms=(ForwardKL(), ForwardKL(temperature=2.0))), "'logits' twice"),
        (lambda: Objective(terms=(CrossEntropy(label="loss"),)), "'loss', which is another metric's name"),
        (lambda: Objective(terms=(ForwardKL(coefficient=math.nan),)), "logits: coefficient is nan"),
        (lambda: Objective(terms=(ForwardKL(coefficient=-1.0),)), "logits: coefficient is -1.0"),
        (lambda: ForwardKL(temperature=0.0), "ForwardKL.temperature is 0.0"),
        (lambda: CrossEntropy(z_loss=-1e-4), "CrossEntropy.z_loss is -0.0001"),
        (lambda: GeneralizedJSD(beta=1), "GeneralizedJSD.beta is 1; it must be between 0 and 1"),
        (lambda: Ramp(steps=0), "Ramp.steps is 0"),
        (lambda: LossImplementation(relations="fast"), "relations is 'fast'; choose one of auto, dense, blocked"),
    ],
)
def test_mistakes_are_refused_in_one_line_that_says_what_would_be_right(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make().validate(STUDENT, TEACHER)
    assert "\n" not in str(caught.value)


def test_a_missing_teacher_and_another_vocabulary_are_refused():
    for term in (ForwardKL(), *relations("cross", ("qk",), relation_heads=6)):
        with pytest.raises(UserError, match="there is none"):
            Objective(terms=(term,)).validate(STUDENT)
    other = TEACHER._replace(vocab_size=101)
    with pytest.raises(UserError, match="logits: .* 101 and 100 entries"):
        Objective(terms=(ForwardKL(),)).validate(STUDENT, other)
    Objective(terms=relations("cross", ("qk",), relation_heads=6)).validate(STUDENT, other)


def test_a_token_term_with_parameters_of_its_own_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match="Projected is a TokenTerm, which cannot have parameters of its own"):

        class Projected(TokenTerm):
            def init_params(self, key, student, teacher):
                return jnp.ones(3)
