"""One entry to all searches: what does not depend on the search, and what settings are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.models.generation import generation
from endistill_jax.models.generation.generation import Decoding, make_decoder
from endistill_jax.models.t5.t5 import T5

EOS = 1
LENGTH = 8
SEARCHES = {
    "greedy": Decoding(max_length=LENGTH),
    "sample": Decoding(max_length=LENGTH, strategy="sample", temperature=1.5, top_k=9, top_p=0.95),
    "beam": Decoding(max_length=LENGTH, strategy="beam", beams=3, length_penalty=0.8),
}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def tokens(batch):
    return np.asarray(batch["encoder_input_tokens"])


@pytest.fixture(scope="module")
def ending_params(params):
    """The head biased towards the end, so that texts end at different lengths."""
    kernel = params["decoder"]["logits_dense"]["kernel"].copy()
    kernel[:, EOS] *= 3
    return params | {"decoder": params["decoder"] | {"logits_dense": {"kernel": kernel}}}


@pytest.fixture(scope="module")
def decoders(config):
    return {name: make_decoder(config, settings) for name, settings in SEARCHES.items()}


@pytest.fixture(scope="module", params=SEARCHES)
def found(request, decoders, ending_params, tokens):
    """The name of a search and what it makes of the batch."""
    return request.param, decoders[request.param](ending_params, tokens, KEY)


def assert_same(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)


def test_nothing_follows_the_end(found):
    name, (tokens, scores) = found
    tokens = np.asarray(tokens)
    assert tokens.shape == (4, LENGTH) and tokens.dtype == np.int32
    assert scores.shape == (4,) and scores.dtype == jnp.float32
    ended = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) > 0
    assert ended.any() and not ended.all(axis=1).any(), name
    assert not tokens[ended].any()


def test_scores_are_the_log_probabilities_of_a_whole_forward_pass(found, config, ending_params, tokens):
    name, (text, scores) = found
    text = np.asarray(text)
    # The padding token may be generated, so that the length is told by the end.
    lengths = np.where((text == EOS).any(axis=1), (text == EOS).argmax(axis=1) + 1, LENGTH)
    forced = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(text, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": np.ones_like(text),
    }
    logits = T5(config).apply({"params": ending_params}, forced).logits
    each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), text[..., None], axis=-1)[..., 0]
    expected = np.where(np.arange(LENGTH) < lengths[:, None], each, 0).sum(axis=1)
    if name == "beam":
        expected /= lengths ** SEARCHES["beam"].length_penalty
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding(found, decoders, ending_params, tokens):
    name, whole = found
    order = np.array([2, 0])
    part = np.concatenate([tokens[order], np.zeros_like(tokens[:2])])
    part = np.pad(part, ((0, 0), (0, 3)))
    row_ids = np.append(order, [100, 101])
    some = decoders[name](ending_params, part, KEY, row_ids)
    assert_same(jax.tree.map(lambda leaf: leaf[:2], some), jax.tree.map(lambda leaf: leaf[order], whole))
    assert not np.asarray(some.tokens[2:]).any() and not np.asarray(some.scores[2:]).any()


@pytest.mark.parametrize("execution", [{"scan_layers": True}, {"scan_layers": False}, {"attention_bytes": 1}])
def test_layers_in_a_loop_or_not_and_attention_in_groups_give_the_same(found, config, ending_params, tokens, execution):
    name, expected = found
    config = dataclasses.replace(config, **execution)
    run = jax.jit(generation.generate, static_argnums=(0, 1))
    assert_same(run(config, SEARCHES[name], ending_params, tokens, KEY), expected)


def test_drawing_from_one_token_is_greedy(config, decoders, ending_params, tokens):
    greedy = decoders["greedy"](ending_params, tokens)
    one = make_decoder(config, dataclasses.replace(SEARCHES["sample"], top_k=1))
    assert_same(one(ending_params, tokens, KEY), greedy)
    nearly_zero = dataclasses.replace(SEARCHES["sample"], top_k=0, top_p=1e-6)
    assert_same(make_decoder(config, nearly_zero)(ending_params, tokens, KEY), greedy)


def test_another_key_draws_another_text(decoders, ending_params, tokens):
    draws = [np.asarray(decoders["sample"](ending_params, tokens, jax.random.key(seed)).tokens) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_one_beam_without_penalty_is_greedy(config, decoders, ending_params, tokens):
    one = make_decoder(config, Decoding(max_length=LENGTH, strategy="beam", beams=1, length_penalty=0.0))
    assert_same(one(ending_params, tokens), decoders["greedy"](ending_params, tokens))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"strategy": "beams"}, "choose one of greedy, sample, beam"),
        ({"max_length": 0}, "max_length is 0; it must be a whole number of at least 1"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number of at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p is 1.1; it must be in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a finite number above 0"),
        ({"beams": 0}, "beams is 0; it must be a whole number of at least 1"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        Decoding(**{"max_length": 4} | settings)


def test_settings_that_do_not_fit_the_model_are_refused(config, ending_params, tokens):
    with pytest.raises(UserError, match="beams is 12; the model's vocabulary of 23 tokens allows 11 beams at most"):
        make_decoder(config, Decoding(max_length=4, strategy="beam", beams=12))
    with pytest.raises(UserError, match="eos_id is 23; the model's vocabulary has 23 tokens"):
        make_decoder(config, Decoding(max_length=4, eos_id=23))
    with pytest.raises(UserError, match="eos_id is 0; the model pads with that"):
        make_decoder(config, Decoding(max_length=4, eos_id=0))
    with pytest.raises(UserError, match="encoder alone and generates no text"):
        make_decoder(dataclasses.replace(config, num_decoder_layers=0), Decoding(max_length=4))
    with pytest.raises(UserError, match="was given no key"):
        make_decoder(config, SEARCHES["sample"])(ending_params, tokens)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_ids_of_padding_start_and_end_are_the_model_s(config, decoders, ending_params, tokens, name):
    """A model whose tokens have other ids says the same in those."""
    new_id = np.arange(config.vocab_size)
    new_id[:3] = [1, 2, 0]  # padding and start 1, the end 2
    old_id = np.argsort(new_id)
    embedding, kernel = (
        ending_params["token_embedder"]["embedding"],
        ending_params["decoder"]["logits_dense"]["kernel"],
    )
    renamed_params = {
        **ending_params,
        "token_embedder": {"embedding": embedding[old_id]},
        "decoder": ending_params["decoder"] | {"logits_dense": {"kernel": kernel[:, old_id]}},
    }
    renamed = dataclasses.replace(config, pad_id=1, eos_id=2, decoder_start_id=1)
    expected = decoders[name](ending_params, tokens)
    found = make_decoder(renamed, SEARCHES[name])(renamed_params, new_id[tokens])
    assert_same(found, expected._replace(tokens=new_id[np.asarray(expected.tokens)]))
