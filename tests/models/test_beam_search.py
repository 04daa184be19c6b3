"""Beam search finds the best text of all when its beams are wide enough."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from endistill_jax.models.generation.search import beam_search
from endistill_jax.models.t5.t5 import T5

EOS, VOCABULARY, LENGTH = 1, 5, 3
INPUTS = np.array([[2, 3, 4, 1], [4, 4, 1, 0], [3, 1, 0, 0]], np.int32)


def all_texts():
    """Every text of at most `LENGTH` tokens: the end comes last or not at all before the full length."""
    others = [token for token in range(VOCABULARY) if token != EOS]
    for length in range(1, LENGTH + 1):
        lasts = [EOS] if length < LENGTH else range(VOCABULARY)
        yield from ((*body, last) for body in itertools.product(others, repeat=length - 1) for last in lasts)


@pytest.fixture(scope="module")
def tiny(config, make_params):
    tiny = dataclasses.replace(config, vocab_size=VOCABULARY, num_encoder_layers=1, num_decoder_layers=2)
    return tiny, make_params(tiny)


@pytest.fixture(scope="module")
def every_text(tiny):
    """All texts, padded, and float64 [inputs, texts], the log-probability of each by a whole forward pass."""
    config, params = tiny
    texts = list(all_texts())
    assert len(texts) == len(set(texts)) == 1 + 4 + 16 * 5
    padded = np.array([(*text, *[0] * (LENGTH - len(text))) for text in texts], np.int32)
    of_each = np.tile(padded, (len(INPUTS), 1))
    forced = {
        "encoder_input_tokens": np.repeat(INPUTS, len(texts), axis=0),
        "decoder_input_tokens": np.pad(of_each, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": np.ones_like(of_each),
    }
    logits = jax.jit(lambda params: T5(config).apply({"params": params}, forced).logits)(params)
    tokens = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), of_each[..., None], axis=-1)[..., 0]
    lengths = np.array([len(text) for text in texts])
    real = np.arange(LENGTH) < np.tile(lengths, len(INPUTS))[:, None]
    return padded, np.where(real, tokens, 0).sum(axis=1).reshape(len(INPUTS), -1).astype(np.float64), lengths


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_wide_beams_find_the_best_of_all_texts(tiny, every_text, length_penalty):
    config, params = tiny
    texts, found, lengths = every_text
    scores = found / lengths**length_penalty
    # So wide that no beginning is ever left out: at most 16 go on.
    settings = {"max_length": LENGTH, "eos_id": EOS, "beams": 20, "length_penalty": length_penalty}
    answers, answer_scores = jax.jit(lambda params: beam_search(config, params, INPUTS, **settings))(params)
    np.testing.assert_array_equal(answers, texts[scores.argmax(axis=1)])
    np.testing.assert_allclose(answer_scores, scores.max(axis=1), rtol=1e-5, atol=1e-5)


def test_penalties_of_this_test_have_different_answers(every_text):
    texts, found, lengths = every_text
    answers = [lengths[(found / lengths**penalty).argmax(axis=1)].sum() for penalty in (0.0, 3.0)]
    assert answers[0] < answers[1]
