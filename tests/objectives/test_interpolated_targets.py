"""Interpolated targets: the teacher's share of every score, and how it grows. test_objective.py compares the forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import Head, Output, Tap
from endistill_jax.objectives import (
    CrossEntropy,
    ForwardKL,
    InterpolatedTargets,
    Objective,
    loss_and_sums,
    relations,
)
from endistill_jax.objectives.implementation import DENSE
from endistill_jax.objectives.interpolated_targets import joined, joined_head
from endistill_jax.objectives.relations import categorical_kl, relation_scores

HEADS, VOCABULARY, LENGTH = 2, 11, 4
INNER, WIDTH = {"teacher": 12, "student": 8}, {"teacher": 6, "student": 4}
OBJECTIVE = Objective(
    terms=(*relations("decoder_self", ("qk",), relation_heads=HEADS), ForwardKL(coefficient=0.5, temperature=2.0))
)
SEEN = jnp.ones((2, LENGTH), int)


def random_output(seed: int, model: str) -> Output:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    tap = Tap(*(array(2, LENGTH, INNER[model]) for _ in "qkv"))
    head = Head(array(2, LENGTH, WIDTH[model]), array(WIDTH[model], VOCABULARY))
    return Output(head=head, taps={("decoder_self", -1): tap})


TEACHER, STUDENT = random_output(0, "teacher"), random_output(1, "student")
_TARGETS = jnp.asarray([[3, 4, 5, 1], [6, 1, 0, 0]])
BATCH = {
    "encoder_input_tokens": _TARGETS,
    "decoder_target_tokens": _TARGETS,
    "decoder_loss_weights": (_TARGETS != 0).astype(jnp.float32),
}


def loss(student: Output, share: float | None) -> jax.Array:
    share = None if share is None else jnp.float32(share)
    weights = OBJECTIVE.weights(BATCH)
    return loss_and_sums(OBJECTIVE, student, TEACHER, BATCH, weights, share=share, implementation=DENSE)[0]


def scores(tap) -> jax.Array:
    return relation_scores(tap[:2], (SEEN, SEEN), HEADS)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scores_of_joined_vectors_are_the_weighted_scores_of_both(share):
    taps = [output.taps["decoder_self", -1][:3] for output in (TEACHER, STUDENT)]
    mixed = [joined(ours, own, jnp.float32(share), HEADS) for ours, own in zip(*taps, strict=True)]
    expected = share * scores(taps[0]) + (1 - share) * scores(taps[1])
    np.testing.assert_allclose(scores(mixed), expected, rtol=1e-5, atol=1e-5)
    logits = joined_head(TEACHER.head, STUDENT.head, jnp.float32(share)).logits()
    np.testing.assert_allclose(logits, share * TEACHER.logits + (1 - share) * STUDENT.logits, rtol=1e-5, atol=1e-5)


def test_loss_is_the_divergence_from_the_mixed_distribution_and_its_target_is_a_constant():
    share, mask = 0.4, _TARGETS != 0

    def by_definition(student: Output) -> jax.Array:
        visible = mask[:, None, :, None] & mask[:, None, None, :] & jnp.tri(LENGTH, dtype=bool)
        own = scores(student.taps["decoder_self", -1])
        target = share * scores(TEACHER.taps["decoder_self", -1]) + (1 - share) * jax.lax.stop_gradient(own)
        relation = jnp.sum(categorical_kl(*(jnp.where(visible, x, -1e30) for x in (target, own)))) / HEADS
        logits = share * TEACHER.logits + (1 - share) * jax.lax.stop_gradient(student.logits)
        tokens = 4 * jnp.sum(jnp.where(mask, categorical_kl(logits / 2, student.logits / 2), 0))
        return (relation + 0.5 * tokens) / jnp.sum(mask)

    expected, expected_gradient = jax.value_and_grad(by_definition)(STUDENT)
    got, gradient = jax.value_and_grad(loss)(STUDENT, share)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected_gradient)


def test_a_share_of_one_is_the_teacher_and_with_a_share_of_zero_nothing_is_to_be_learned():
    np.testing.assert_allclose(loss(STUDENT, 1.0), loss(STUDENT, None), rtol=1e-5)
    nothing, gradient = jax.value_and_grad(loss)(STUDENT, 0.0)
    assert abs(nothing) < 1e-5
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-5


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_scores_in_bfloat16_have_no_error_but_the_rounding_of_vectors(share):
    """A rounded factor would make all scores too large, or too small, by the same; rounded vectors go either way."""
    rng = np.random.default_rng(0)
    # For these sizes of a head the teacher's factor is 1.0829, in bfloat16 1.0859.
    teacher, student = (jnp.asarray(rng.normal(size=(1, 200, size * HEADS)), jnp.bfloat16) for size in (64, 24))
    mixed = joined(teacher, student, jnp.float32(share), HEADS)

    def own_scores(vectors: jax.Array) -> jax.Array:
        found = relation_scores((vectors, vectors), (jnp.ones((1, 200), int),) * 2, HEADS)
        return jnp.diagonal(found, axis1=-2, axis2=-1)  # of a vector and itself: all positive

    expected = share * own_scores(teacher) + (1 - share) * own_scores(student)
    np.testing.assert_allclose(jnp.mean(own_scores(mixed) / expected), 1, atol=1e-3)


# --- the share ---


def test_the_share_grows_linearly_from_more_than_nothing_and_stays_at_one():
    targets = InterpolatedTargets(start=0.2, steps=4)
    shares = [float(targets.share(jnp.asarray(step))) for step in (0, 1, 3, 9)]
    np.testing.assert_allclose(shares, [0.4, 0.6, 1.0, 1.0], rtol=1e-6)
    # A share of 0 would leave rounding errors for a gradient.
    assert float(InterpolatedTargets(steps=10).share(jnp.asarray(0))) == pytest.approx(0.1)
    assert targets.init_state() is None


def _adaptive_shares(losses, **settings):
    targets = InterpolatedTargets(steps=1000, momentum=0.5, **settings)
    state, shares = targets.init_state(), []
    for step, measured in enumerate(losses):
        shares.append(float(targets.share(jnp.asarray(step), state)))
        state = targets.update(jnp.asarray(step), state, jnp.float32(measured))
    return shares


def test_an_adaptive_share_follows_the_formula_of_taid():
    losses, rate, momentum = [4.0, 3.0, 3.5, 1.0, 1.0], 0.1, 0.5
    expected, share, change = [], 0.0, 0.0
    for step, measured in enumerate(losses):
        share = max((step + 1) / 1000, share)
        expected.append(share)
        relative = (losses[step - 1] - measured) / losses[step - 1] if step else 0.0
        change = momentum * change + (1 - momentum) * relative
        share = min(share + rate / (1 + np.exp(-change)) * (1 - share), 1.0)
    np.testing.assert_allclose(_adaptive_shares(losses, adaptive_rate=rate), expected, rtol=1e-6)


def test_an_adaptive_share_grows_faster_the_faster_the_loss_falls_and_never_above_one():
    falling = _adaptive_shares([2.0**-step for step in range(40)], adaptive_rate=0.3)
    rising = _adaptive_shares([2.0**step for step in range(40)], adaptive_rate=0.3)
    assert falling == sorted(falling) and rising == sorted(rising)
    assert falling[5] > rising[5] > 6 / 1000 and falling[-1] <= 1.0


@pytest.mark.parametrize(
    "settings",
    [{"start": 1.5, "steps": 3}, {"steps": 0}, {"steps": 3, "adaptive_rate": -1.0}, {"steps": 3, "momentum": 2}],
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(UserError, match="InterpolatedTargets.(start|steps|adaptive_rate|momentum) is"):
        InterpolatedTargets(**settings)


def test_an_objective_without_a_teacher_has_no_targets_to_interpolate():
    objective = Objective(terms=(CrossEntropy(),), interpolated_targets=InterpolatedTargets(steps=3))
    with pytest.raises(UserError, match="interpolated_targets"):
        objective.validate(None)
