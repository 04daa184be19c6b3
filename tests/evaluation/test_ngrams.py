"""Contracts of the n-gram references: proper distributions, exact counts, no infinities, bounded memory."""

import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.ngrams import NgramCounter

VOCAB = 12


def as_batch(previous, targets, weights=None):
    targets = np.atleast_2d(targets).astype(np.int32)
    return {
        "decoder_input_tokens": np.atleast_2d(previous).astype(np.int32),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones_like(targets) if weights is None else np.atleast_2d(weights),
    }


def markov_batch(seed, rows=8, length=50, noise=0.3):
    """Token after `v` is `v + 1` but for noise: much to gain from the previous token. Row starts are token 0."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, length + 1), np.int64)
    for place in range(length):
        random = rng.integers(1, VOCAB, rows)
        tokens[:, place + 1] = np.where(rng.random(rows) < noise, random, tokens[:, place] % (VOCAB - 1) + 1)
    return as_batch(tokens[:, :-1], tokens[:, 1:])


def fit(*batches):
    counter = NgramCounter(VOCAB)
    for batch in batches:
        counter.update(batch)
    return counter.fit()


def test_probabilities_of_every_context_sum_to_one_seen_or_not():
    model = fit(as_batch([0, 3, 3, 4, 3], [3, 4, 5, 3, 4]))
    assert np.exp(-model.unigram_nats(np.arange(VOCAB))).sum() == pytest.approx(1)
    contexts, targets = np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij")
    probabilities = np.exp(-model.bigram_nats(contexts, targets))
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities > 0).all()


def test_bigram_of_an_unseen_context_is_the_unigram():
    model = fit(as_batch([0, 3, 3, 4, 3], [3, 4, 5, 3, 4]))
    unseen, targets = np.full(VOCAB, 9), np.arange(VOCAB)
    np.testing.assert_array_equal(model.bigram_nats(unseen, targets), model.unigram_nats(targets))


def test_unigram_is_smoothed_counts():
    counter = NgramCounter(VOCAB)
    counter.update(as_batch([0, 3, 4], [3, 4, 3]))
    model = counter.fit(smoothing=2.0)
    expected = np.array([4 if token == 3 else 3 if token == 4 else 2 for token in range(VOCAB)]) / (3 + 2 * VOCAB)
    np.testing.assert_allclose(np.exp(-model.unigram_nats(np.arange(VOCAB))), expected)


def test_counts_do_not_depend_on_batches():
    batches = [markov_batch(seed) for seed in range(4)]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    one, many = fit(joined), fit(*batches)
    for field in ("unigram", "context_counts", "pair_codes", "pair_counts", "interpolation"):
        np.testing.assert_array_equal(getattr(one, field), getattr(many, field))
    pairs = joined["decoder_input_tokens"].astype(np.int64) * VOCAB + joined["decoder_target_tokens"]
    np.testing.assert_array_equal(one.pair_counts, np.bincount(pairs.ravel())[one.pair_codes])


def test_fitting_midway_does_not_disturb_counting():
    counter = NgramCounter(VOCAB)
    counter.update(markov_batch(0))
    counter.fit()
    counter.update(markov_batch(1))
    np.testing.assert_array_equal(counter.fit().pair_counts, fit(markov_batch(0), markov_batch(1)).pair_counts)


def test_positions_without_weight_are_not_counted():
    model = fit(as_batch([0, 3, 7], [3, 4, 8], [1, 1, 0]))
    assert model.pair_counts.sum() == 2
    np.testing.assert_array_equal(model.pair_codes, [3, 3 * VOCAB + 4])


def test_interpolation_weight_is_the_best_on_other_text():
    """Markov text of a known noise: the fitted weight must score held-out text nearly as well as the best fixed one."""
    model = fit(*[markov_batch(seed) for seed in range(3)])
    held_out = markov_batch(9, rows=40)
    previous, targets = held_out["decoder_input_tokens"], held_out["decoder_target_tokens"]
    codes = previous.astype(np.int64) * VOCAB + targets
    counts = np.zeros(VOCAB * VOCAB)
    counts[model.pair_codes] = model.pair_counts
    frequency = counts[codes] / model.context_counts[previous]
    fixed = [-np.log(a * frequency + (1 - a) * model.unigram[targets]).mean() for a in np.linspace(0, 0.999, 200)]
    fitted = model.bigram_nats(previous, targets).mean()
    assert fitted < min(fixed) + 0.02
    assert min(fixed) + 0.02 < min(fixed[0], fixed[-1])  # else any weight would do
    assert fitted < model.unigram_nats(targets).mean() - 0.5


def test_bigram_gives_up_on_contexts_seen_once_and_repeats_stay_finite():
    once = fit(as_batch([0, 3, 4, 5], [3, 4, 5, 6]))
    assert (once.interpolation == 0).all()
    sure = fit(as_batch([0] + [3, 4] * 40, [3, 4] * 40 + [3]))
    nats = sure.bigram_nats(np.array([3, 3, 0]), np.array([4, 9, 9]))
    assert np.isfinite(nats).all() and nats[0] < 0.01 < nats[1]


def test_memory_is_bounded_by_a_largest_number_of_tokens():
    counter = NgramCounter(VOCAB, max_tokens=120)
    counter.update(markov_batch(0, rows=2))
    assert not counter.full
    counter.update(markov_batch(1, rows=2))
    counter.update(markov_batch(2, rows=2))
    assert counter.full and counter.tokens == 120 and counter.fit().pair_counts.sum() == 120


def test_user_mistakes_are_told():
    counter = NgramCounter(VOCAB)
    with pytest.raises(UserError, match="no target tokens"):
        counter.fit()
    with pytest.raises(UserError, match="token id 12.*vocabulary of 12"):
        counter.update(as_batch([0], [VOCAB]))
