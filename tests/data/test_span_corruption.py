"""Span corruption: what T5's settings must give, and that nothing of a text is lost."""

import numpy as np
import pytest
import tensorflow as tf

from endistill_jax.core.errors import UserError
from endistill_jax.data import span_corruption
from endistill_jax.data.span_corruption import corruption_lengths

FIRST_SENTINEL, EOS = 9_999, 1


@tf.function(reduce_retracing=True)
def _corrupt_standard(tokens, seed):
    return _corrupt(tokens, seed, 0.15, 3.0)


@tf.function(reduce_retracing=True)
def _corrupt_half(tokens, seed):
    return _corrupt(tokens, seed, 0.5, 5.0)


def _corrupt(tokens, seed, noise_density, mean_span_length):
    return span_corruption.corrupt(
        tokens,
        seed,
        first_sentinel=FIRST_SENTINEL,
        eos_id=EOS,
        noise_density=noise_density,
        mean_span_length=mean_span_length,
    )


SETTINGS = [(_corrupt_standard, 0.15, 3.0), (_corrupt_half, 0.5, 5.0)]


def _run(function, length, seed):
    tokens = np.arange(100, 100 + length, dtype=np.int32)
    corrupted = function(tf.constant(tokens), tf.constant([seed, 7], tf.int64))
    return tokens, corrupted["inputs"].numpy(), corrupted["targets"].numpy()


def _is_sentinel(tokens):
    return tokens > FIRST_SENTINEL - 1000


@pytest.mark.parametrize(
    ("settings", "lengths"), [((512, 0.15, 3.0), (568, 114)), ((128, 0.5, 5.0), (212, 128)), ((3, 0.15, 3.0), (2, 3))]
)
def test_lengths_of_known_settings(settings, lengths):
    assert corruption_lengths(*settings) == lengths


@pytest.mark.parametrize("inputs_length", [8, 31, 128, 200])
@pytest.mark.parametrize(("noise_density", "mean_span_length"), [(0.15, 3.0), (0.5, 5.0), (0.9, 1.0), (0.01, 20.0)])
def test_lengths_are_the_longest_that_fit(inputs_length, noise_density, mean_span_length):
    tokens, targets = corruption_lengths(inputs_length, noise_density, mean_span_length)
    lengths = [span_corruption.corrupted_lengths(n, noise_density, mean_span_length) for n in range(2, tokens + 2)]
    assert all(inputs <= inputs_length for inputs, _ in lengths[:-1])
    assert all(shorter <= targets for _, shorter in lengths[:-1])
    assert lengths[-1][0] > inputs_length


@pytest.mark.parametrize(("function", "noise_density", "mean_span_length"), SETTINGS)
@pytest.mark.parametrize("length", [2, 3, 7, 97, 212])
def test_lengths_are_exact_for_every_seed(function, noise_density, mean_span_length, length):
    expected = span_corruption.corrupted_lengths(length, noise_density, mean_span_length)
    for seed in range(5):
        _, inputs, targets = _run(function, length, seed)
        assert (len(inputs), len(targets)) == expected


@pytest.mark.parametrize("length", [2, 5, 60, 212])
@pytest.mark.parametrize(("function", "noise_density", "mean_span_length"), SETTINGS)
def test_text_is_recoverable(function, noise_density, mean_span_length, length, restore_text):
    for seed in range(5):
        tokens, inputs, targets = _run(function, length, seed)
        assert restore_text(inputs, targets, FIRST_SENTINEL) == tokens.tolist()
        assert inputs[-1] == EOS and targets[-1] == EOS


@pytest.mark.parametrize(("function", "noise_density", "mean_span_length"), SETTINGS)
def test_sentinels_descend_and_pair_up(function, noise_density, mean_span_length):
    _, inputs, targets = _run(function, 212, 3)
    spans = span_corruption.span_counts(212, noise_density, mean_span_length)[1]
    expected = [FIRST_SENTINEL - number for number in range(spans)]
    assert inputs[_is_sentinel(inputs)].tolist() == expected
    assert targets[_is_sentinel(targets)].tolist() == expected
    assert targets[0] == FIRST_SENTINEL and not _is_sentinel(inputs[0])


@pytest.mark.parametrize(("function", "noise_density", "mean_span_length"), SETTINGS)
def test_density_and_span_length_are_as_asked(function, noise_density, mean_span_length):
    length = 1000
    _, inputs, targets = _run(function, length, 0)
    taken_out = len(targets) - 1 - _is_sentinel(targets).sum()
    assert taken_out == length * noise_density
    assert taken_out / _is_sentinel(targets).sum() == pytest.approx(mean_span_length, abs=0.01)


def test_every_inner_token_is_as_likely_to_be_taken_out():
    taken_out = np.zeros(60)
    draws = 400
    for seed in range(draws):
        _, _, targets = _run(_corrupt_half, 60, seed)
        taken_out[targets[(targets >= 100) & (targets < 160)] - 100] += 1
    # Five standard errors of a share of one half. The ends are special: the first is kept, the last taken out.
    assert np.abs(taken_out[20:40] / draws - 0.5).max() < 5 * 0.5 / np.sqrt(draws)
    assert taken_out[0] == 0 and taken_out[-1] == draws


def test_segments_are_a_uniform_partition():
    counts = {}
    for seed in range(600):
        lengths = tuple(span_corruption.random_segments(5, 3, tf.constant([seed, 1])).numpy())
        counts[lengths] = counts.get(lengths, 0) + 1
    assert len(counts) == 6  # ways to write 5 as an ordered sum of three positive numbers
    assert all(sum(lengths) == 5 and min(lengths) >= 1 for lengths in counts)
    assert all(abs(count - 100) < 5 * np.sqrt(600 * 1 / 6 * 5 / 6) for count in counts.values())


def test_seed_alone_decides():
    same = [_run(_corrupt_standard, 200, 4)[1].tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert _run(_corrupt_standard, 200, 5)[1].tolist() != same[0]


def test_concatenated_chunks_are_full_and_lose_nothing():
    texts = [list(range(start, start + length)) for start, length in ((10, 3), (20, 17), (40, 1), (50, 9))]
    dataset = tf.data.Dataset.from_generator(lambda: texts, output_signature=tf.TensorSpec([None], tf.int32))
    chunks = [c.tolist() for c in span_corruption.split_into_chunks(dataset, 7, True).as_numpy_iterator()]
    assert sum(chunks, []) == sum(texts, [])
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 2]


def test_separate_documents_never_share_a_chunk():
    texts = [[1] * 3, [2] * 16, [3], [4] * 9]
    dataset = tf.data.Dataset.from_generator(lambda: texts, output_signature=tf.TensorSpec([None], tf.int32))
    chunks = [c.tolist() for c in span_corruption.split_into_chunks(dataset, 7, False).as_numpy_iterator()]
    assert chunks == [[1] * 3, [2] * 7, [2] * 7, [2] * 2, [4] * 7, [4] * 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((2, 0.15, 3.0), "too short"),
        ((64, 0.0, 3.0), "noise_density is 0"),
        ((64, 0.15, 0.5), "mean_span_length is 0.5"),
    ],
)
def test_impossible_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        corruption_lengths(*settings)
