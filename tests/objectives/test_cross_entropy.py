"""Properties of the cross-entropy with real targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from endistill_jax.objectives.cross_entropy import cross_entropy

WEIGHTS = np.array([[1.0, 0.5, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]], np.float32)
TARGETS = np.array([[3, 1, 6, 0], [2, 0, 0, 0]], np.int32)
VOCABULARY = 7


def _logits(seed=0):
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((*WEIGHTS.shape, VOCABULARY)).astype(np.float32)


def _reference(logits, z_loss):
    logits = np.asarray(logits, np.float64)
    normaliser = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]
    return np.sum(WEIGHTS * (normaliser - chosen + z_loss * normaliser**2))


@functools.partial(jax.jit, static_argnames="z_loss")
def _value_and_gradient(logits, targets, weights, z_loss=0.0):
    return jax.value_and_grad(cross_entropy, has_aux=True)(logits, targets, weights, z_loss)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradient_match_the_float64_reference(z_loss):
    logits = _logits()
    (total, weight), gradient = _value_and_gradient(logits, TARGETS, WEIGHTS, z_loss)
    np.testing.assert_allclose(total, _reference(logits, z_loss), rtol=1e-5)
    assert float(weight) == WEIGHTS.sum()
    numeric, step = np.zeros(logits.shape), 1e-5
    for index in np.ndindex(*logits.shape):
        up, down = logits.astype(np.float64), logits.astype(np.float64)
        up[index] += step
        down[index] -= step
        numeric[index] = (_reference(up, z_loss) - _reference(down, z_loss)) / (2 * step)
    assert np.abs(numeric).max() > 1e-2
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)


def test_value_agrees_with_optax():
    logits = _logits(seed=1)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
    np.testing.assert_allclose(cross_entropy(logits, TARGETS, WEIGHTS)[0], np.sum(WEIGHTS * expected), rtol=1e-5)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    total, weight = cross_entropy(np.zeros_like(_logits()), TARGETS, WEIGHTS)
    np.testing.assert_allclose(total / weight, np.log(VOCABULARY), rtol=1e-6)


def test_logits_too_large_for_a_plain_exponential_stay_finite():
    logits = 1e4 * np.eye(VOCABULARY, dtype=np.float32)[TARGETS]
    (total, _), gradient = _value_and_gradient(logits, TARGETS, WEIGHTS)
    assert float(total) == 0.0
    (total, _), gradient = _value_and_gradient(-logits, TARGETS, WEIGHTS)
    np.testing.assert_allclose(total, WEIGHTS.sum() * 1e4, rtol=1e-3)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("padding", [1e4, np.inf, np.nan])
def test_padding_values_change_neither_value_nor_gradient(padding):
    logits = _logits()
    expected = _value_and_gradient(logits, TARGETS, WEIGHTS, 0.1)
    spoilt = np.where(WEIGHTS[..., None] == 0, np.float32(padding), logits)
    impossible = np.where(WEIGHTS == 0, -1, TARGETS)
    actual = _value_and_gradient(spoilt, impossible, WEIGHTS, 0.1)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert not np.any(actual[1][WEIGHTS == 0])


@pytest.mark.parametrize("target", [-1, VOCABULARY])
def test_a_real_target_outside_the_vocabulary_is_not_given_a_plausible_loss(target):
    targets = TARGETS.copy()
    targets[0, 0] = target
    assert np.isnan(cross_entropy(_logits(), targets, WEIGHTS)[0])


def test_integer_weights_and_half_precision_logits_give_float32_sums():
    total, weight = cross_entropy(jnp.asarray(_logits(), jnp.bfloat16), TARGETS, (WEIGHTS != 0).astype(np.int32))
    assert total.dtype == weight.dtype == jnp.float32
    assert float(weight) == 4.0
