"""Attention of split heads: its arithmetic and gradient, at once and in groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.attention import visible_keys
from endistill_jax.models.t5.attention import MASKED_SCORE, attend, attend_in_groups, attention_weights

BATCH, HEADS, QUERIES, KEYS, HEAD_DIM = 4, 6, 5, 7, 3
HEAD_BYTES = 4 * QUERIES * KEYS
# What a group holds -> its bytes; one head of one example has 140 bytes of scores, 100 where the mask is causal.
GROUPS = {"two heads": 1, "three heads": 3 * HEAD_BYTES, "two examples": 12 * HEAD_BYTES, "all": 24 * HEAD_BYTES}


@pytest.mark.parametrize("has_bias", [True, False])
def test_attention_weights_and_their_gradient_are_those_of_a_masked_softmax(has_bias):
    rng = np.random.default_rng(0)
    scores, cotangent = rng.normal(0, 3, (2, 4, 3, 5, 6)).astype(np.float32)
    bias = rng.normal(size=(1, 3, 5, 6)).astype(np.float32) if has_bias else None
    mask = rng.random((4, 1, 5, 6)) < 0.6
    mask[1, 0, 2] = False  # a row that sees no key

    def plain(scores, bias):
        scores = scores if bias is None else scores + bias
        return jax.nn.softmax(jnp.where(mask, scores, MASKED_SCORE))

    def own(scores, bias):
        return attention_weights(scores, bias, mask, jnp.float32)

    (expected, expect), (actual, pull_back) = jax.vjp(plain, scores, bias), jax.vjp(own, scores, bias)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, atol=1e-6), pull_back(cotangent), expect(cotangent))
    assert not np.asarray(pull_back(cotangent)[0])[1, :, 2].any()


def _inputs(mask, has_bias):
    """(vectors and bias, mask): random, with one example that sees nothing."""
    rng = np.random.default_rng(1)
    key_length = QUERIES if mask == "causal" else KEYS
    lengths = (QUERIES, key_length, key_length)
    vectors = [rng.normal(size=(BATCH, HEADS, length, HEAD_DIM)).astype(np.float32) for length in lengths]
    bias = rng.normal(size=(1, HEADS, QUERIES, key_length)).astype(np.float32) if has_bias else None
    filled = np.array([3, 5, 0, 4])[:, None]
    segments = [
        np.where(np.arange(length) < filled, 1 + (mask == "packed") * (np.arange(length) >= 2), 0)
        for length in (QUERIES, key_length)
    ]
    return (*vectors, bias), visible_keys(*segments, causal=mask == "causal")[:, None]


@pytest.mark.parametrize("group_bytes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("mask", "has_bias"), [("padded", True), ("packed", False), ("causal", True)])
def test_groups_give_the_values_and_gradients_of_all_scores_at_once(mask, has_bias, group_bytes):
    arrays, visible = _inputs(mask, has_bias)
    cotangent = np.random.default_rng(2).normal(size=arrays[0].shape).astype(np.float32)

    def with_gradient(form):
        value, pull_back = jax.vjp(lambda query, key, value, bias: form(query, key, value, visible, bias), *arrays)
        return value, pull_back(cotangent)

    expected = jax.jit(functools.partial(with_gradient, attend))()
    found = jax.jit(functools.partial(with_gradient, functools.partial(attend_in_groups, group_bytes=group_bytes)))()
    # Float32 sums of at most seven terms in another order; of a bias, over the four examples.
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6), found, expected)
    assert np.abs(expected[0]).max() > 1


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_groups_hold_the_scores_of_a_few_heads_only(gradient):
    shape = jax.ShapeDtypeStruct
    vectors, mask = shape((8, 8, 64, 2), jnp.float32), shape((8, 1, 64, 64), bool)
    scores = 4 * 64 * 64  # bytes of one head of one example

    def temporaries(form):
        def total(vectors, mask):
            return jnp.sum(jnp.square(form(vectors, vectors, vectors, mask, None)))

        program = jax.jit(jax.grad(total) if gradient else total).lower(vectors, mask).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(attend) >= 64 * scores
    assert temporaries(functools.partial(attend_in_groups, group_bytes=2 * scores)) < 32 * scores
