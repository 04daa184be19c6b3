"""Interpolated targets: the teacher's share of every score, whatever the form of the losses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from endistill_jax.objectives.divergence import categorical_kl
from endistill_jax.objectives.logits_kl import logits_kl

from endistill_jax.core.errors import UserError
from endistill_jax.objectives import (
    Computation,
    Head,
    InterpolatedTargets,
    Path,
    Site,
    interpolate_output,
    loss_from_outputs,
    term_weights,
)
from endistill_jax.objectives.relations import MASKED_SCORE, relation_scores, visible_keys

HEADS, VOCABULARY, LENGTHS = 2, 11, {"source": 5, "target": 4}
INNER, WIDTH = {"teacher": 12, "student": 8}, {"teacher": 6, "student": 4}
PATH = Path(
    encoder_self=Site(relations=("qq", "vv"), relation_heads=HEADS),
    decoder_self=Site(relations=("qk",), relation_heads=HEADS),
    cross=Site(relations=("qk", "vv"), relation_heads=HEADS),
    logits_weight=0.5,
    temperature=2.0,
)


class Tap(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


class Output(NamedTuple):
    logits: jax.Array | None
    taps: dict[str, Tap]
    head: Head | None = None


def random_output(rng: np.random.Generator, model: str, with_head: bool = False) -> Output:
    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def vectors(side: str) -> jax.Array:
        return array(2, LENGTHS[side], INNER[model])

    sides = {"encoder_self": ["source"] * 3, "decoder_self": ["target"] * 3, "cross": ["target", "source", "source"]}
    taps = {site: Tap(*map(vectors, three)) for site, three in sides.items()}
    head = Head(array(2, LENGTHS["target"], WIDTH[model]), array(WIDTH[model], VOCABULARY))
    if with_head:
        return Output(None, taps, head)
    return Output(head.hidden @ head.kernel, taps)


def some_batch(rng: np.random.Generator) -> dict[str, jax.Array]:
    source = jnp.asarray([[3, 4, 5, 6, 7], [3, 4, 0, 0, 0]])
    target = jnp.asarray([[3, 4, 5, 1], [6, 1, 0, 0]])
    return {
        "encoder_input_tokens": source,
        "decoder_input_tokens": jnp.pad(target, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": target,
        "decoder_loss_weights": (target != 0).astype(jnp.float32),
    }


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def loss(teacher: Output, student: Output, share: float, batch, computation: Computation) -> jax.Array:
    mixed = interpolate_output(teacher, student, jnp.float32(share), PATH.relation_heads)
    return loss_from_outputs(PATH, student, mixed, batch, term_weights(PATH, batch), computation)[0]


DENSE = Computation(relations="dense", vocabulary="dense")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_relation_scores_of_joined_vectors_are_the_weighted_scores_of_both(rng, share):
    teacher, student = random_output(rng, "teacher"), random_output(rng, "student")
    mixed = interpolate_output(teacher, student, jnp.float32(share), PATH.relation_heads)
    seen = jnp.ones((2, LENGTHS["target"]), int)

    def scores(output: Output) -> jax.Array:
        tap = output.taps["decoder_self"]
        return relation_scores(tap.query, tap.key, seen, seen, HEADS)

    expected = share * scores(teacher) + (1 - share) * scores(student)
    np.testing.assert_allclose(scores(mixed), expected, rtol=1e-5, atol=1e-5)


def test_loss_is_the_divergence_from_the_mixed_distribution_and_its_target_is_a_constant(rng):
    teacher, student = random_output(rng, "teacher"), random_output(rng, "student")
    batch, share = some_batch(rng), 0.4
    only = Path(decoder_self=PATH.decoder_self, logits_weight=0.5, temperature=2.0)
    segments = (batch["decoder_target_tokens"] != 0).astype(int)
    rows = jnp.sum(segments)

    def by_definition(student: Output) -> jax.Array:
        visible = visible_keys(segments, segments, causal=True)[:, None]

        def scores(output: Output) -> jax.Array:
            tap = output.taps["decoder_self"]
            return relation_scores(tap.query, tap.key, segments, segments, HEADS)

        target = jax.lax.stop_gradient(share * scores(teacher) + (1 - share) * scores(student))
        masked = [jnp.where(visible, x, MASKED_SCORE) for x in (target, scores(student))]
        relation = jnp.sum(categorical_kl(*masked)) / HEADS / rows
        logits = jax.lax.stop_gradient(share * teacher.logits + (1 - share) * student.logits)
        words, weight = logits_kl(logits, student.logits, batch["decoder_loss_weights"], only.temperature)
        return relation + 0.5 * words / weight

    def by_vectors(student: Output) -> jax.Array:
        mixed = interpolate_output(teacher, student, jnp.float32(share), only.relation_heads | PATH.relation_heads)
        return loss_from_outputs(only, student, mixed, batch, term_weights(only, batch), DENSE)[0]

    expected, expected_gradient = jax.value_and_grad(by_definition)(student)
    got, gradient = jax.value_and_grad(by_vectors)(student)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected_gradient)


def test_forms_that_save_memory_equal_the_dense_ones(rng):
    batch = some_batch(rng)
    state = rng.bit_generator.state
    dense = [random_output(rng, model) for model in ("teacher", "student")]
    rng.bit_generator.state = state
    unapplied = [random_output(rng, model, with_head=True) for model in ("teacher", "student")]

    expected, by_dense = jax.value_and_grad(loss, argnums=1)(*dense, 0.4, batch, DENSE)
    grouped = Computation(relations="grouped", vocabulary="chunked", group_bytes=256, chunk_bytes=512)
    got, by_grouped = jax.value_and_grad(loss, argnums=1)(*unapplied, 0.4, batch, grouped)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for site, tap in by_dense.taps.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), by_grouped.taps[site], tap)
    by_hidden = by_dense.logits @ unapplied[1].head.kernel.T
    np.testing.assert_allclose(by_grouped.head.hidden, by_hidden, rtol=1e-4, atol=1e-6)


def test_a_share_of_one_is_the_teacher_and_a_share_of_zero_teaches_nothing(rng):
    teacher, student = random_output(rng, "teacher"), random_output(rng, "student")
    batch = some_batch(rng)
    plain = loss_from_outputs(PATH, student, teacher, batch, term_weights(PATH, batch), DENSE)[0]
    np.testing.assert_allclose(loss(teacher, student, 1.0, batch, DENSE), plain, rtol=1e-5)
    nothing, gradient = jax.value_and_grad(loss, argnums=1)(teacher, student, 0.0, batch, DENSE)
    assert abs(nothing) < 1e-5
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-5


def test_the_share_grows_linearly_and_stays_at_one():
    targets = InterpolatedTargets(start=0.2, steps=4)
    shares = [float(targets.share(jnp.asarray(step))) for step in (0, 1, 3, 9)]
    np.testing.assert_allclose(shares, [0.4, 0.6, 1.0, 1.0], rtol=1e-6)


def test_the_first_step_learns_from_more_than_rounding_errors():
    assert float(InterpolatedTargets(steps=10).share(jnp.asarray(0))) == pytest.approx(0.1)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_scores_in_bfloat16_have_no_error_but_the_rounding_of_vectors(rng, share):
    """A rounded factor would make all scores too large, or too small, by the same; rounded vectors go either way."""

    def vectors(size: int) -> Tap:
        x = jnp.asarray(rng.normal(size=(1, 200, size * HEADS)), jnp.bfloat16)
        return Tap(x, x, x)

    # For these sizes of a head the teacher's factor is 1.0829, in bfloat16 1.0859.
    teacher, student = (Output(None, {"encoder_self": vectors(size)}) for size in (64, 24))
    mixed = interpolate_output(teacher, student, jnp.float32(share), {"encoder_self": HEADS})
    seen = jnp.ones((1, 200), int)

    def own_scores(output: Output) -> jax.Array:
        tap = output.taps["encoder_self"]
        scores = relation_scores(tap.query, tap.key, seen, seen, HEADS)
        return jnp.diagonal(scores, axis1=-2, axis2=-1)  # of a vector and itself: all positive

    expected = share * own_scores(teacher) + (1 - share) * own_scores(student)
    np.testing.assert_allclose(jnp.mean(own_scores(mixed) / expected), 1, atol=1e-3)


@pytest.mark.parametrize(("settings", "message"), [({"start": 1.5, "steps": 3}, "start"), ({"steps": 0}, "steps")])
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        InterpolatedTargets(**settings)


def test_a_path_without_a_teacher_has_no_targets_to_interpolate():
    path = Path(lm_weight=1.0, interpolated_targets=InterpolatedTargets(steps=3))
    with pytest.raises(UserError, match="interpolated_targets"):
        path.validate(None)
