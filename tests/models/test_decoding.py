"""Generating with kept keys and values says what the whole forward pass says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from endistill_jax.models.generation.generation import Decoding, generate
from endistill_jax.models.generation.search import search
from endistill_jax.models.t5 import decoding
from endistill_jax.models.t5.t5 import T5

EOS = 1
LENGTH = 12


def v1_0(config):
    return dataclasses.replace(config, mlp_activations=("relu",), tied_head=True)


def v1_1(config):
    return config


def unrolled(config):
    return dataclasses.replace(config, scan_layers=False)


def tied_and_gated(config):
    return dataclasses.replace(config, tied_head=True, scan_layers=False)


def umt5(config):
    return dataclasses.replace(config, bias_per_layer=True)


def umt5_unrolled(config):
    return dataclasses.replace(config, bias_per_layer=True, scan_layers=False)


KINDS = pytest.mark.parametrize("kind", [v1_0, v1_1, unrolled, tied_and_gated, umt5, umt5_unrolled])


@pytest.fixture(scope="module")
def source(batch):
    """Four inputs of unequal lengths, padded."""
    return {"encoder_input_tokens": batch["encoder_input_tokens"]}


def uncached_logits(config, params, source, targets):
    """[batch, length, vocab_size] of the whole forward pass; every target token counts as real."""
    inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    forced = {"decoder_input_tokens": inputs, "decoder_target_tokens": np.ones_like(targets)}
    return T5(config).apply({"params": params}, source | forced).logits


@KINDS
def test_each_step_gives_the_logits_of_the_whole_forward_pass(config, make_params, source, kind):
    config = kind(config)
    params = make_params(config)
    assert config.inner_dim != config.d_model and config.num_encoder_layers != config.num_decoder_layers
    # Longer than `relative_max_distance`, so that every bucket is met; tokens of value 0 and 1 are ordinary here.
    targets = np.random.default_rng(2).integers(0, config.vocab_size, (4, 16)).astype(np.int32)
    expected = uncached_logits(config, params, source, targets)

    tokens = source["encoder_input_tokens"]
    segments = jnp.asarray(tokens != 0, jnp.int32)
    cross = decoding.cross_keys_values(config, params, decoding.encode(config, params, tokens, segments))
    step = jax.jit(lambda *args: decoding.read_tokens(config, *args))
    keys_values = decoding.Source(params, cross, segments)
    cache = decoding.init_cache(config, len(tokens), targets.shape[1], split=False)
    inputs = np.pad(targets, ((0, 0), (1, 0)))
    for index in range(targets.shape[1]):
        logits, cache = step(keys_values, cache, inputs[:, index, None])
        np.testing.assert_allclose(logits[:, 0], expected[:, index], atol=1e-5, rtol=1e-5)
    assert cache.index == targets.shape[1]


@KINDS
def test_encoder_output_is_the_forward_pass_s(config, make_params, batch, kind):
    config = kind(config)
    params = make_params(config)
    expected = T5(config).apply({"params": params}, batch).encoded
    tokens = batch["encoder_input_tokens"]
    encoded = decoding.encode(config, params, tokens, jnp.asarray(tokens != 0, jnp.int32))
    np.testing.assert_allclose(encoded, expected, atol=1e-6, rtol=1e-6)


def greedy_by_whole_passes(config, params, source):
    targets = np.zeros((len(source["encoder_input_tokens"]), LENGTH), np.int32)
    finished = np.zeros(len(targets), bool)
    for index in range(LENGTH):
        likeliest = np.argmax(uncached_logits(config, params, source, targets)[:, index], axis=-1)
        targets[:, index] = np.where(finished, 0, likeliest)
        finished |= targets[:, index] == EOS
    return targets


def with_likely_end(params):
    """The same parameters, the head biased towards the end so that examples end at different lengths."""
    kernel = params["decoder"]["logits_dense"]["kernel"].copy()
    kernel[:, EOS] *= 3
    return params | {"decoder": params["decoder"] | {"logits_dense": {"kernel": kernel}}}


def greedy(config, params, source):
    tokens = source["encoder_input_tokens"]
    return jax.jit(generate, static_argnums=(0, 1))(config, Decoding(max_length=LENGTH), params, tokens).tokens


def test_greedy_is_the_argmax_of_whole_passes(config, params, source):
    params = with_likely_end(params)
    expected = greedy_by_whole_passes(config, params, source)
    lengths = (expected != 0).sum(axis=1)
    assert len(set(lengths)) > 1, f"examples should end at different lengths, and all have {lengths}"
    for variant in (config, unrolled(config)):
        np.testing.assert_array_equal(greedy(variant, params, source), expected)


def test_greedy_does_not_depend_on_padding(config, params, source):
    padded = {name: np.pad(tokens, ((0, 0), (0, 5))) for name, tokens in source.items()}
    np.testing.assert_array_equal(greedy(config, params, padded), greedy(config, params, source))


def test_search_stops_when_every_example_has_ended(small, make_params, source):
    params = make_params(small)

    def third_is_end(logits, state):
        return jnp.where(state.cache.index == 2, EOS, jnp.full(len(logits), 5, jnp.int32))

    state = search(small, params, source["encoder_input_tokens"], LENGTH, EOS, third_is_end)
    assert state.cache.index == 3
    np.testing.assert_array_equal(state.tokens, [[5, 5, EOS] + [0] * (LENGTH - 3)] * 4)


def test_an_ended_example_stays_ended_while_others_go_on(small, make_params, source):
    params = make_params(small)

    def by_row(logits, state):
        return jnp.where(jnp.arange(4) == state.cache.index, EOS, 5)

    state = search(small, params, source["encoder_input_tokens"], LENGTH, EOS, by_row)
    assert state.cache.index == 4
    expected = np.array([[EOS, 0, 0, 0], [5, EOS, 0, 0], [5, 5, EOS, 0], [5, 5, 5, EOS]])
    np.testing.assert_array_equal(state.tokens[:, :4], expected)
    assert not state.tokens[:, 4:].any()


def test_search_ends_at_the_given_length(small, make_params, source):
    tokens = source["encoder_input_tokens"]
    state = search(small, make_params(small), tokens, 3, EOS, lambda logits, state: jnp.full(4, 5, jnp.int32))
    np.testing.assert_array_equal(state.tokens, np.full((4, 3), 5))
    assert not state.finished.any()


def test_cache_is_laid_out_layers_first_then_examples(config):
    cache = decoding.init_cache(dataclasses.replace(config, dtype="bfloat16"), 5, 7)
    for leaf in cache.kept:
        assert leaf.shape == (config.num_decoder_layers, 5, config.num_heads, 7, config.head_dim)
        assert leaf.dtype == jnp.bfloat16
    assert cache.index == 0 and cache.index.shape == ()
