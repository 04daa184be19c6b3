"""Properties of the dense relation loss, against a float64 reference that loops over rows and heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.attention import RowMasks
from endistill_jax.objectives.relations import relation_kl

TEACHER_DIM, STUDENT_DIM = 24, 12  # for instance 4 heads of 6, and 3 heads of 4

# Name -> (query segments, key segments, causal). All but the first have ragged lengths.
MASKS = {
    "full": ([[1, 1, 1, 1]] * 2, [[1, 1, 1, 1]] * 2, False),
    "ragged": ([[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]], False),
    "causal": ([[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]], True),
    "cross": ([[1, 1, 1], [1, 1, 0]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], False),
    "packed causal": ([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]],) * 2 + (True,),
    "packed cross": ([[1, 2, 2, 0], [1, 1, 1, 2]], [[1, 1, 1, 2, 2], [1, 2, 2, 0, 0]], False),
    "a query sees no key": ([[1, 1, 0], [1, 2, 2]], [[0, 0, 0], [1, 1, 0]], False),
}


def _log_softmax(scores):
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def _reference(teacher, student, relation_heads, query_segments, key_segments, causal):
    """(sum, gradient of the sum by the student's two arrays) in float64, one row and head at a time."""
    teacher, student = ([np.asarray(x, np.float64) for x in pair] for pair in (teacher, student))
    total, gradients = 0.0, tuple(np.zeros_like(x) for x in student)
    for b, i in np.ndindex(*np.shape(query_segments)):
        segment = query_segments[b][i]
        keys = [j for j, s in enumerate(key_segments[b]) if s == segment and not (causal and j > i)]
        if segment == 0 or not keys:
            continue
        for r in range(relation_heads):

            def scores(pair, r=r, b=b, i=i, keys=keys):
                dim = pair[0].shape[-1] // relation_heads
                head = slice(r * dim, (r + 1) * dim)
                return pair[1][b, keys, head] @ pair[0][b, i, head] / np.sqrt(dim), head, np.sqrt(dim)

            log_teacher = _log_softmax(scores(teacher)[0])
            student_scores, head, scale = scores(student)
            log_student = _log_softmax(student_scores)
            total += np.sum(np.exp(log_teacher) * (log_teacher - log_student)) / relation_heads
            by_scores = (np.exp(log_student) - np.exp(log_teacher)) / relation_heads / scale
            gradients[0][b, i, head] += by_scores @ student[1][b, keys, head]
            gradients[1][b, keys, head] += by_scores[:, None] * student[0][b, i, head]
    return total, gradients


def _vectors(mask, seed=0, scale=1.0):
    """Random (teacher, student) pairs in float32 and the mask's segments as arrays."""
    rng = np.random.default_rng(seed)
    query_segments, key_segments, causal = MASKS[mask]
    query_segments, key_segments = np.asarray(query_segments, np.int32), np.asarray(key_segments, np.int32)

    def pair(dim):
        shapes = (*query_segments.shape, dim), (*key_segments.shape, dim)
        return tuple(scale * rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    return pair(TEACHER_DIM), pair(STUDENT_DIM), query_segments, key_segments, causal


@functools.partial(jax.jit, static_argnames=("relation_heads", "causal"))
def _value_and_gradients(teacher, student, relation_heads, query_segments, key_segments, causal):
    """The sum, and its gradients by (teacher, student)."""

    def loss(teacher, student):
        return relation_kl(teacher, student, relation_heads, RowMasks(query_segments, key_segments, causal))

    return jax.value_and_grad(loss, argnums=(0, 1))(teacher, student)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("relation_heads", [2, 6])  # 6 is the number of heads of neither model
def test_value_and_gradient_match_the_float64_reference(mask, relation_heads):
    teacher, student, *masks = _vectors(mask)
    total, (_, gradients) = _value_and_gradients(teacher, student, relation_heads, *masks)
    expected_total, expected_gradients = _reference(teacher, student, relation_heads, *masks)
    assert expected_total > 0
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_gradient_matches_finite_differences_of_the_float64_reference():
    teacher, student, *masks = _vectors("cross", seed=1)
    _, (_, gradients) = _value_and_gradients(teacher, student, 6, *masks)
    step = 1e-5
    for which in (0, 1):
        numeric = np.zeros(student[which].shape)
        for index in np.ndindex(*numeric.shape):
            values = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in student]
                moved[which][index] += sign * step
                values.append(_reference(teacher, moved, 6, *masks)[0])
            numeric[index] = (values[0] - values[1]) / (2 * step)
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(gradients[which], numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", ["causal", "packed cross"])
def test_loss_and_gradient_are_zero_for_identical_models(mask):
    teacher, _, *masks = _vectors(mask)
    total, (_, gradients) = _value_and_gradients(teacher, teacher, 6, *masks)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_direction_is_from_teacher_to_student():
    even, skewed = np.array([0.5, 0.5]), np.array([0.9, 0.1])

    def pair(probabilities):  # one query, one head of size one: the scores are the keys
        return np.ones((1, 1, 1), np.float32), np.log(probabilities).astype(np.float32)[None, :, None]

    segments = np.ones((1, 1), np.int32), np.ones((1, 2), np.int32), False
    total, _ = _value_and_gradients(pair(even), pair(skewed), 1, *segments)
    forward, reverse = np.sum(even * np.log(even / skewed)), np.sum(skewed * np.log(skewed / even))
    assert abs(forward - reverse) > 0.1
    np.testing.assert_allclose(total, forward, rtol=1e-5)


def test_teacher_gets_no_gradient():
    teacher, student, *masks = _vectors("full")
    _, (gradients, _) = _value_and_gradients(teacher, student, 6, *masks)
    for gradient in gradients:
        assert not np.any(gradient)


@pytest.mark.parametrize("padding", [1e4, np.inf, np.nan])
@pytest.mark.parametrize("mask", ["causal", "packed cross", "a query sees no key"])
def test_padding_values_change_neither_value_nor_gradient(mask, padding):
    teacher, student, *masks = _vectors(mask)
    expected = _value_and_gradients(teacher, student, 6, *masks)
    spoilt = [
        tuple(np.where(s[..., None] == 0, np.float32(padding), x) for x, s in zip(pair, masks[:2], strict=True))
        for pair in (teacher, student)
    ]
    actual = _value_and_gradients(*spoilt, 6, *masks)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for gradient, segments in zip(actual[1][1], masks[:2], strict=True):
        assert not np.any(gradient[segments == 0])


def test_rows_that_see_no_key_give_finite_gradients():
    teacher, student, *masks = _vectors("a query sees no key")
    total, (_, gradients) = _value_and_gradients(teacher, student, 6, *masks)
    assert np.isfinite(total)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(gradients[0][0]) and np.any(gradients[0][1, 0])


def test_batch_without_any_visible_key_gives_zero_and_finite_gradients():
    teacher, student, query_segments, key_segments, causal = _vectors("cross")
    total, (_, gradients) = _value_and_gradients(teacher, student, 6, query_segments, 0 * key_segments, causal)
    assert float(total) == 0.0
    assert all(not np.any(gradient) for gradient in gradients)


def test_scores_too_large_for_a_plain_exponential_match_the_reference():
    teacher, student, *masks = _vectors("causal", scale=30.0)
    total, (_, gradients) = _value_and_gradients(teacher, student, 6, *masks)
    expected, expected_gradients = _reference(teacher, student, 6, *masks)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_vectors_give_float32_sums():
    teacher, student, *masks = _vectors("cross")
    half = [tuple(jnp.asarray(x, jnp.bfloat16) for x in pair) for pair in (teacher, student)]
    total, (_, gradients) = _value_and_gradients(*half, 6, *masks)
    assert total.dtype == jnp.float32
    assert gradients[0].dtype == jnp.bfloat16
    rounded = [tuple(np.asarray(x, np.float32) for x in pair) for pair in half]
    np.testing.assert_allclose(total, _reference(*rounded, 6, *masks)[0], rtol=1e-5)
