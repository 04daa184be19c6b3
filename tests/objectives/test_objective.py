"""The objective depends on the examples only: not on how they are padded, packed or cut into micro-batches.

Examples are made once, as vectors per token, and laid out in batches in different ways.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.cross_entropy import cross_entropy
from endistill_jax.objectives.implementation import Computation
from endistill_jax.objectives.logits_kl import logits_kl
from endistill_jax.objectives.loss import coefficients, combine, loss_from_outputs, term_sums, term_weights
from endistill_jax.objectives.objective import RELATIONS, SITES, Path, Site
from endistill_jax.objectives.relations import relation_kl
from endistill_jax.objectives.vocabulary_tokens import Head

LENGTHS = ((4, 3), (0, 2), (2, 5), (5, 1))  # (source, target) of each example; the second has an empty source
VOCABULARY = 5
INNER_DIM = {"teacher": 12, "student": 8}

_ALL = Site(relations=RELATIONS, relation_heads=4)
EVERYTHING = Path(
    encoder_self=dataclasses.replace(_ALL, weight=0.5),
    decoder_self=_ALL,
    cross=dataclasses.replace(_ALL, weight=2.0, relation_heads=2),
    logits_weight=0.7,
    temperature=2.0,
    lm_weight=0.3,
    z_loss=0.01,
)


class Tap(NamedTuple):
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


class Output(NamedTuple):
    logits: np.ndarray | None
    taps: dict[str, Tap]
    head: Head | None = None


def _per_side(encoder, decoder):
    """An Output whose leaves say of which side of the batch they are."""
    cross = Tap(decoder, encoder, encoder)
    return Output(decoder, {"encoder_self": Tap(*[encoder] * 3), "decoder_self": Tap(*[decoder] * 3), "cross": cross})


SIDES = _per_side("source", "target")


@functools.cache
def _examples(model):
    """One Output an example, leaves `[length, ...]`."""
    rng = np.random.default_rng({"teacher": 0, "student": 1}[model])

    def example(lengths):
        by_side = dict(zip(("source", "target"), lengths, strict=True))
        vectors = jax.tree.map(lambda side: rng.standard_normal((by_side[side], INNER_DIM[model])), SIDES)
        return vectors._replace(logits=2 * rng.standard_normal((lengths[1], VOCABULARY)))

    return [jax.tree.map(np.float32, example(lengths)) for lengths in LENGTHS]


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
    """Which examples stand in each row, and how long the rows are."""

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
        """Joins arrays of single examples, `[length, ...]`, to one `[row, row length, ...]`."""
        array = np.full((len(self.rows), getattr(self, side), *pieces[0].shape[1:]), fill, pieces[0].dtype)
        for example, row, where in self.places(side):
            array[row, where] = pieces[example]
        return array

    def take_apart(self, side, array):
        """The reverse of lay_out: by example."""
        return {example: np.asarray(array)[row, where] for example, row, where in self.places(side)}

    def output(self, model, fill=0.0):
        return jax.tree.map(lambda side, *pieces: self.lay_out(side, pieces, fill), SIDES, *_examples(model))

    def batch(self):
        batch = {
            name: self.lay_out("source" if name.startswith("encoder") else "target", [t[name] for t in _tokens()])
            for name in _tokens()[0]
        }
        batch = {name: x.astype(np.float32 if "weights" in name else np.int32) for name, x in batch.items()}
        if all(len(examples) <= 1 for examples in self.rows):
            return batch
        numbers = {example: i for examples in self.rows for i, example in enumerate(examples, start=1)}
        ids = {
            side: [np.full(lengths[k], numbers[e], np.int32) for e, lengths in enumerate(LENGTHS)]
            for k, side in enumerate(("source", "target"))
        }
        packed = {f"{name}_segment_ids": self.lay_out(side, ids[side]) for name, side in _STACKS.items()}
        return batch | packed


_STACKS = {"encoder": "source", "decoder": "target"}
TIGHT = Layout(((0,), (1,), (2,), (3,)), source=5, target=5)
PADDED = Layout(((0,), (1,), (2,), (3,)), source=9, target=7)
PACKED = Layout(((0, 1), (3, 2)), source=8, target=7)


@functools.partial(jax.jit, static_argnames="path")
def _run(path, student, teacher, batch, normaliser):
    """Loss (divided by `normaliser`), gradient by the student's and the teacher's output, sums, weights."""

    def loss(student, teacher):
        sums = term_sums(path, student, teacher, batch)
        return combine(path, sums, normaliser), sums

    (value, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(student, teacher)
    return value, gradients, sums, term_weights(path, batch)


@functools.cache
def _of_layout(layout, fill=0.0):
    batch = layout.batch()
    normaliser = term_weights(EVERYTHING, batch)
    return _run(EVERYTHING, layout.output("student", fill), layout.output("teacher", fill), batch, normaliser)


def _assert_same_objective(layout, fill=0.0):
    """Asserts that a layout has the loss, terms, weights, and gradient by each token's vectors, of the tight one."""
    loss, (gradient, _), sums, weights = _of_layout(layout, fill)
    expected_loss, (expected_gradient, _), expected_sums, expected_weights = _of_layout(TIGHT)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert {k: float(v) for k, v in weights.items()} == {k: float(v) for k, v in expected_weights.items()}
    for name in expected_sums:
        np.testing.assert_allclose(sums[name], expected_sums[name], rtol=1e-5, err_msg=name)

    def compare(side, actual, expected):
        actual, expected = layout.take_apart(side, actual), TIGHT.take_apart(side, expected)
        for example in range(len(LENGTHS)):
            np.testing.assert_allclose(actual[example], expected[example], rtol=1e-4, atol=1e-6)
        assert any(np.any(x) for x in expected.values())

    jax.tree.map(compare, SIDES, gradient, expected_gradient)


def test_loss_does_not_depend_on_the_amount_of_padding():
    _assert_same_objective(PADDED)


def test_loss_does_not_depend_on_packing():
    _assert_same_objective(PACKED)


@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("fill", [np.nan, -np.inf])
def test_loss_does_not_depend_on_padding_values(layout, fill):
    _assert_same_objective(layout, fill)


def test_packing_without_segment_ids_is_another_loss():
    batch = {name: x for name, x in PACKED.batch().items() if "segment" not in name}
    # Else the test of packing would show nothing.
    normaliser = term_weights(EVERYTHING, batch)
    loss, *_ = _run(EVERYTHING, PACKED.output("student"), PACKED.output("teacher"), batch, normaliser)
    assert abs(loss - _of_layout(TIGHT)[0]) > 0.01


_dense = jax.jit(relation_kl, static_argnames=("relation_heads", "causal"))


def _rows(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def test_loss_does_not_depend_on_microbatching():
    student, teacher, batch = TIGHT.output("student"), TIGHT.output("teacher"), TIGHT.batch()
    expected_loss, (expected_gradient, _), expected_sums, expected_weights = _of_layout(TIGHT)
    parts = [
        _run(EVERYTHING, *(_rows(x, cut) for x in (student, teacher, batch)), expected_weights)
        for cut in (slice(0, 1), slice(1, 4))
    ]
    add = functools.partial(jax.tree.map, lambda *shares: sum(shares))
    np.testing.assert_allclose(add(*[p[0] for p in parts]), expected_loss, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), add(*[p[2] for p in parts]), expected_sums)
    assert {k: float(v) for k, v in add(*[p[3] for p in parts]).items()} == {
        k: float(v) for k, v in expected_weights.items()
    }
    gradient = jax.tree.map(lambda *shares: np.concatenate(shares), *[p[1][0] for p in parts])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), gradient, expected_gradient)


def test_mean_of_the_means_of_microbatches_is_another_loss():
    _, _, sums, weights = _of_layout(TIGHT)
    student, teacher, batch = TIGHT.output("student"), TIGHT.output("teacher"), TIGHT.batch()
    parts = [
        _run(EVERYTHING, *(_rows(x, cut) for x in (student, teacher, batch)), weights)
        for cut in (slice(0, 1), slice(1, 4))
    ]
    for name in coefficients(EVERYTHING):
        of_means = np.mean([p[2][name] / p[3][name] for p in parts])
        assert abs(of_means - sums[name] / weights[name]) > 1e-3, name


def test_loss_is_zero_and_flat_where_the_student_equals_the_teacher():
    path = dataclasses.replace(EVERYTHING, lm_weight=0.0)
    teacher, batch = PACKED.output("teacher"), PACKED.batch()
    loss, (gradient, _), sums, weights = _run(path, teacher, teacher, batch, term_weights(path, batch))
    assert sums.keys() == weights.keys() and all(float(weight) > 0 for weight in weights.values())
    for value in (loss, *sums.values()):
        np.testing.assert_allclose(value, 0.0, atol=1e-5)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-6)


def test_teacher_gets_no_gradient():
    for leaf in jax.tree.leaves(_of_layout(PACKED)[1][1]):
        assert not np.any(leaf)


@pytest.mark.parametrize("layout", [TIGHT, PACKED], ids=["unpacked", "packed"])
def test_terms_are_the_dense_losses_on_the_right_sides_and_masks(layout):
    student, teacher, batch = layout.output("student"), layout.output("teacher"), layout.batch()
    if layout is PACKED:
        segments = {side: batch[f"{stack}_segment_ids"] for stack, side in _STACKS.items()}
    else:
        segments = {
            "source": np.array([[i < source for i in range(5)] for source, _ in LENGTHS], np.int32),
            "target": np.array([[i < target for i in range(5)] for _, target in LENGTHS], np.int32),
        }
    expected = {
        "logits": logits_kl(teacher.logits, student.logits, batch["decoder_loss_weights"], 2.0),
        "lm": cross_entropy(student.logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"], 0.01),
    }
    fields = {"q": "query", "k": "key", "v": "value"}
    for site in SITES:
        for relation in RELATIONS:
            first, second = (fields[x] for x in relation)
            expected[f"{site}/{relation}"] = _dense(
                *((getattr(x.taps[site], first), getattr(x.taps[site], second)) for x in (teacher, student)),
                relation_heads=2 if site == "cross" else 4,
                query_segments=segments[getattr(SIDES.taps[site], first)],
                key_segments=segments[getattr(SIDES.taps[site], second)],
                causal=site == "decoder_self",
            )
    _, _, sums, weights = _of_layout(layout)
    assert sums.keys() == weights.keys() == expected.keys()
    for name, (total, weight) in expected.items():
        np.testing.assert_allclose(sums[name], total, rtol=1e-5, err_msg=name)
        assert float(weights[name]) == float(weight), name


def test_weights_are_the_numbers_of_rows_and_tokens():
    weights = {name: float(w) for name, w in term_weights(EVERYTHING, PACKED.batch()).items()}
    sources, targets = (sum(column) for column in zip(*LENGTHS, strict=True))
    with_source = sum(target for source, target in LENGTHS if source)
    assert weights["encoder_self/qk"] == weights["cross/kk"] == weights["cross/vv"] == sources
    assert weights["decoder_self/vv"] == weights["cross/qq"] == targets
    assert weights["cross/qk"] == with_source != targets
    assert weights["logits"] == weights["lm"] == sum(t["decoder_loss_weights"].sum() for t in _tokens()) != targets


def test_coefficients_share_a_site_weight_among_its_relations():
    path = Path(
        encoder_self=Site(relations=("qq", "kk", "vv"), weight=1.5, relation_heads=4),
        decoder_self=Site(relations=("qq",), weight=0.0),
        cross=Site(relations=("qk", "vv"), weight=4.0, relation_heads=4),
        logits_weight=0.7,
    )
    expected = {
        "encoder_self/qq": 0.5,
        "encoder_self/kk": 0.5,
        "encoder_self/vv": 0.5,
        "cross/qk": 2.0,
        "cross/vv": 2.0,
    }
    assert coefficients(path) == expected | {"logits": 0.7}
    assert coefficients(Path(lm_weight=2.0)) == {"lm": 2.0}
    assert term_weights(path, TIGHT.batch()).keys() == coefficients(path).keys()


def test_loss_is_the_weighted_sum_of_the_terms_means():
    loss, _, sums, weights = _of_layout(TIGHT)
    terms = {name: float(sums[name]) / float(weights[name]) for name in sums}
    expected = sum(
        {"encoder_self": 0.5 / 4, "decoder_self": 1 / 4, "cross": 2 / 4, "logits": 0.7, "lm": 0.3}[name.split("/")[0]]
        * x
        for name, x in terms.items()
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_path_without_a_teacher_runs_without_one():
    path, batch = Path(lm_weight=1.0), TIGHT.batch()
    sums, weights = term_sums(path, TIGHT.output("student"), None, batch), term_weights(path, batch)
    expected, weight = cross_entropy(
        TIGHT.output("student").logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    )
    assert sums.keys() == {"lm"}
    np.testing.assert_allclose(combine(path, sums, weights), expected / weight, rtol=1e-6)


def test_terms_of_weight_zero_add_nothing_to_loss_and_gradient():
    path = Path(logits_weight=0.5, lm_weight=1.0)
    sums, weights = {"logits": np.float32(3), "lm": np.float32(0)}, {"logits": np.float32(6), "lm": np.float32(0)}
    loss, gradient = jax.value_and_grad(combine, argnums=1)(path, sums, weights)
    np.testing.assert_allclose(loss, 0.25)
    assert float(gradient["lm"]) == 0.0
    np.testing.assert_allclose(gradient["logits"], 0.5 / 6, rtol=1e-6)


def test_batch_of_nothing_but_padding_has_loss_zero_and_finite_gradients():
    empty = jax.tree.map(np.zeros_like, PACKED.batch())
    nothing = np.nan * np.zeros(1, np.float32)
    student, teacher = (jax.tree.map(lambda x: x + nothing, PACKED.output(m)) for m in ("student", "teacher"))
    loss, gradients, _, weights = _run(EVERYTHING, student, teacher, empty, term_weights(EVERYTHING, empty))
    assert float(loss) == 0.0
    assert all(float(w) == 0.0 for w in weights.values())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


COMPUTATIONS = {
    "dense": Computation(relations="dense", vocabulary="dense"),
    "fast": Computation(relations="grouped", vocabulary="chunked"),
    "fast in parts": Computation(group_bytes=300, chunk_bytes=200),
}


def _with_head(model, layout):
    """An output whose logits come of hidden states."""
    rng = np.random.default_rng({"teacher": 3, "student": 4}[model])
    width = INNER_DIM[model]
    hidden = [rng.standard_normal((target, width)).astype(np.float32) for _, target in LENGTHS]
    kernel = rng.standard_normal((width, VOCABULARY)).astype(np.float32)
    head = Head(layout.lay_out("target", hidden, 0.5), kernel)
    return layout.output(model)._replace(logits=None, head=head)


@functools.partial(jax.jit, static_argnames=("path", "computation"))
def _loss_from_outputs(path, computation, student, teacher, batch):
    def loss(outputs):
        if not computation.chunks_vocabulary(len(batch["decoder_target_tokens"])):
            outputs = [x._replace(logits=x.head.hidden @ x.head.kernel, head=None) for x in outputs]
        return loss_from_outputs(path, *outputs, batch, term_weights(path, batch), computation)

    return jax.value_and_grad(loss, has_aux=True)((student, teacher))


PATHS = {
    "everything": EVERYTHING,
    "logits": Path(logits_weight=1.0),
    "words without a teacher": Path(lm_weight=1.0, z_loss=0.1),
}


@pytest.mark.parametrize("layout", [TIGHT, PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", [name for name in COMPUTATIONS if name != "dense"])
def test_every_form_of_the_losses_gives_one_objective(name, path, layout):
    student, teacher, batch = _with_head("student", layout), _with_head("teacher", layout), layout.batch()
    run = functools.partial(_loss_from_outputs, path, student=student, teacher=teacher, batch=batch)
    (expected, expected_sums), (expected_gradient, _) = run(COMPUTATIONS["dense"])
    (loss, sums), (gradient, by_teacher) = run(COMPUTATIONS[name])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert sums.keys() == expected_sums.keys() == {*coefficients(path), "cross_entropy", "teacher_cross_entropy"}
    for term, total in expected_sums.items():
        np.testing.assert_allclose(sums[term], total, rtol=2e-6, err_msg=term)

    def compare(actual, whole):
        assert np.isfinite(actual).all()
        assert np.linalg.norm(actual - whole) <= 2e-6 * np.linalg.norm(whole)

    jax.tree.map(compare, gradient, expected_gradient)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_teacher))


def test_forms_of_the_losses_that_do_not_exist_are_an_error():
    with pytest.raises(UserError, match="computation.relations is 'fast'; choose auto, dense or grouped"):
        loss_from_outputs(
            EVERYTHING,
            TIGHT.output("student"),
            TIGHT.output("teacher"),
            TIGHT.batch(),
            term_weights(EVERYTHING, TIGHT.batch()),
            Computation(relations="fast"),
        )
