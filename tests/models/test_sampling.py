"""What is drawn, how often, and from what it depends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.models.generation.search import draw, filter_logits, largest

PROBABILITIES = np.array([0.4, 0.05, 0.25, 0.1, 0.2], np.float32)
LOGITS = np.log(PROBABILITIES)[None]
ROWS = 20_000


def kept(**settings):
    return np.isfinite(np.asarray(filter_logits(jnp.asarray(LOGITS), **settings))[0]).tolist()


def test_top_k_keeps_the_likeliest():
    assert kept(top_k=2) == [True, False, True, False, False]
    assert kept(top_k=1) == [True, False, False, False, False]
    assert kept(top_k=0) == kept(top_k=5) == kept(top_k=9) == [True] * 5


@pytest.mark.parametrize(
    "top_p, tokens",
    [(1e-6, {0}), (0.39, {0}), (0.41, {0, 2}), (0.8, {0, 2, 4}), (0.9, {0, 2, 3, 4}), (0.96, {0, 1, 2, 3, 4})],
)
def test_top_p_keeps_the_fewest_that_have_enough(top_p, tokens):
    assert kept(top_p=top_p) == [index in tokens for index in range(5)]


def test_top_p_is_the_prefix_of_the_sorted_tokens_on_random_logits():
    logits = np.random.default_rng(0).normal(0, 3, (50, 301)).astype(np.float32)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        found = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), top_p=top_p)))
        probabilities = np.exp(logits.astype(np.float64))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        ranked = -np.sort(-probabilities, axis=1)
        before = np.cumsum(ranked, axis=1) - ranked  # what the likelier ones have
        np.testing.assert_array_equal(found.sum(axis=1), (before < top_p).sum(axis=1))
        assert (np.where(found, probabilities, 1).min(axis=1) >= np.where(found, 0, probabilities).max(axis=1)).all()


def test_top_p_applies_to_what_top_k_left():
    # Of 0.4, 0.25 and 0.2, which have 0.85 together, the first has 0.47 and the first two 0.76.
    assert kept(top_k=3, top_p=0.45) == [True, False, False, False, False]
    assert kept(top_k=3, top_p=0.75) == [True, False, True, False, False]


@pytest.mark.parametrize(
    "settings, weights",
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"top_k": 3}, PROBABILITIES * [1, 0, 1, 0, 1]),
        ({"top_p": 0.6, "temperature": 0.8}, PROBABILITIES**1.25 * [1, 0, 1, 0, 0]),
    ],
)
def test_frequencies_are_those_of_the_filtered_distribution(settings, weights):
    logits = jnp.broadcast_to(filter_logits(jnp.asarray(LOGITS), **settings), (ROWS, 5))
    drawn = draw(logits, jax.random.key(3), jnp.arange(ROWS), jnp.asarray(7))
    expected = weights / weights.sum()
    found = np.bincount(drawn, minlength=5)
    assert not found[expected == 0].any()
    possible = expected > 0
    chi_square = ((found - ROWS * expected)[possible] ** 2 / (ROWS * expected[possible])).sum()
    assert chi_square < 18.5  # of at most 4 degrees of freedom: exceeded once in a thousand keys, and the key is fixed


def test_a_row_is_drawn_by_key_row_and_position_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 50)), jnp.float32)
    key, rows, position = jax.random.key(0), jnp.arange(8) + 3, jnp.asarray(2)
    whole = draw(logits, key, rows, position)
    order = jnp.asarray([6, 1, 4])
    np.testing.assert_array_equal(draw(logits[order], key, rows[order], position), whole[order])
    same = jnp.broadcast_to(logits[:1], (200, 50))
    first = draw(same, key, jnp.arange(200), position)
    assert len(set(np.asarray(first).tolist())) > 10
    assert (first != draw(same, key, jnp.arange(200), position + 1)).any()
    assert (first != draw(same, jax.random.key(1), jnp.arange(200), position)).any()


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("size", [23, 8192, 8200])
def test_largest_is_top_k_also_among_equal_values(size, count):
    rng = np.random.default_rng(0)
    many_equal = rng.integers(0, 40, (6, size)).astype(np.float32)
    mostly_nothing = np.where(rng.random((6, size)) < 0.001, rng.normal(size=(6, size)), -np.inf).astype(np.float32)
    for values in (many_equal, mostly_nothing, rng.normal(size=(6, size)).astype(np.float32)):
        found, index = largest(jnp.asarray(values), count)
        expected, expected_index = jax.lax.top_k(values, count)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(index, expected_index)
