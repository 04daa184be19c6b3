"""Properties of the divergence of vocabulary distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.objectives.logits_kl import logits_kl

WEIGHTS = np.array([[1.0, 0.5, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]], np.float32)
VOCABULARY = 7


def _log_softmax(scores):
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _reference(teacher, student, weights, temperature):
    log_teacher, log_student = (_log_softmax(np.asarray(x, np.float64) / temperature) for x in (teacher, student))
    divergence = np.sum(np.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return temperature**2 * np.sum(weights * divergence), np.exp(log_student) - np.exp(log_teacher)


def _logits(seed=0):
    rng = np.random.default_rng(seed)
    return [3 * rng.standard_normal((*WEIGHTS.shape, VOCABULARY)).astype(np.float32) for _ in range(2)]


@functools.partial(jax.jit, static_argnames="temperature")
def _value_and_gradients(teacher, student, weights, temperature=1.0):
    (total, weight), gradients = jax.value_and_grad(logits_kl, argnums=(0, 1), has_aux=True)(
        teacher, student, weights, temperature
    )
    return total, weight, gradients


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_match_the_float64_reference(temperature):
    teacher, student = _logits()
    total, weight, (by_teacher, by_student) = _value_and_gradients(teacher, student, WEIGHTS, temperature)
    expected, difference = _reference(teacher, student, WEIGHTS, temperature)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(weight) == WEIGHTS.sum()
    np.testing.assert_allclose(by_student, temperature * WEIGHTS[..., None] * difference, rtol=1e-4, atol=1e-6)
    assert not np.any(by_teacher)


def test_gradient_matches_finite_differences_of_the_float64_reference():
    teacher, student = _logits(seed=1)
    _, _, (_, gradient) = _value_and_gradients(teacher, student, WEIGHTS, 2.0)
    numeric, step = np.zeros(student.shape), 1e-5
    for index in np.ndindex(*student.shape):
        values = []
        for sign in (1, -1):
            moved = student.astype(np.float64)
            moved[index] += sign * step
            values.append(_reference(teacher, moved, WEIGHTS, 2.0)[0])
        numeric[index] = (values[0] - values[1]) / (2 * step)
    assert np.abs(numeric).max() > 1e-2
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_are_zero_for_identical_models():
    teacher, _ = _logits()
    total, _, (_, gradient) = _value_and_gradients(teacher, teacher, WEIGHTS, 2.0)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_direction_is_from_teacher_to_student():
    even, skewed = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    one_token = [np.log(p).astype(np.float32)[None, None] for p in (even, skewed)]
    total, _, _ = _value_and_gradients(*one_token, np.ones((1, 1), np.float32))
    forward, reverse = np.sum(even * np.log(even / skewed)), np.sum(skewed * np.log(skewed / even))
    assert abs(forward - reverse) > 0.1
    np.testing.assert_allclose(total, forward, rtol=1e-5)


def test_adding_a_constant_to_all_logits_of_a_token_changes_nothing():
    teacher, student = _logits()
    expected, _, _ = _value_and_gradients(teacher, student, WEIGHTS)
    shifted, _, _ = _value_and_gradients(teacher + 50, student - 50, WEIGHTS)
    np.testing.assert_allclose(shifted, expected, rtol=1e-4)


@pytest.mark.parametrize("padding", [1e4, np.inf, np.nan])
def test_padding_values_change_neither_value_nor_gradient(padding):
    teacher, student = _logits()
    expected = _value_and_gradients(teacher, student, WEIGHTS, 2.0)
    spoilt = [np.where(WEIGHTS[..., None] == 0, np.float32(padding), x) for x in (teacher, student)]
    actual = _value_and_gradients(*spoilt, WEIGHTS, 2.0)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert not np.any(actual[2][1][WEIGHTS == 0])


def test_integer_weights_and_half_precision_logits_give_float32_sums():
    teacher, student = (jnp.asarray(x, jnp.bfloat16) for x in _logits())
    mask = (WEIGHTS != 0).astype(np.int32)
    total, weight = logits_kl(teacher, student, mask)
    assert total.dtype == weight.dtype == jnp.float32
    expected, _ = _reference(np.asarray(teacher, np.float32), np.asarray(student, np.float32), mask, 1.0)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_vocabularies_of_different_sizes_are_an_error():
    teacher, student = _logits()
    with pytest.raises(UserError, match="7 entries.* 6;.*one vocabulary"):
        logits_kl(teacher, student[..., :-1], WEIGHTS)
