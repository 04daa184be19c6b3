"""Generating text: the decoder one token at a time, with the keys and values of earlier tokens kept.

Everything here is a pure function of the stacked parameters. A search encodes once, computes the encoder's keys and
values once, and then repeats `decode_step`; `greedy` is the simplest one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from endistill_jax.batch import Batch, segment_ids
from endistill_jax.errors import UserError
from endistill_jax.model.blocks import DecoderLayer
from endistill_jax.model.config import T5Config
from endistill_jax.model.layers import Attention, KeysValues, RelativePositionBias, RMSNorm
from endistill_jax.model.t5 import Embedding, Encoder, Head, apply_head

START_TOKEN = 0  # T5 begins a target with the padding token


class Cache(NamedTuple):
    """What the decoder keeps of the tokens it has read.

    Attributes:
        kept: keys and values of its self-attention, each [layers, batch, num_heads, max_length, head_dim].
        index: int32 scalar, how many tokens were read.
    """

    kept: KeysValues
    index: jax.Array


class SearchState(NamedTuple):
    """What a search carries from one token to the next.

    Attributes:
        cache: of the tokens read so far.
        token: int32 [batch], the one to be read next.
        tokens: int32 [batch, max_length], what was generated, then padding.
        finished: bool [batch], whether the end was generated.
    """

    cache: Cache
    token: jax.Array
    tokens: jax.Array
    finished: jax.Array


def init_cache(config: T5Config, batch_size: int, max_length: int) -> Cache:
    """An empty cache for `max_length` tokens of each example."""
    shape = (config.num_decoder_layers, batch_size, config.num_heads, max_length, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    return Cache(kept=KeysValues(zeros, zeros), index=jnp.zeros((), jnp.int32))


def encode(config: T5Config, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """The encoder's output, without dropout: [batch, source, d_model].

    Args:
        config: the model's settings.
        params: all its parameters.
        tokens: int [batch, source].
        segments: int [batch, source], 0 is padding.
    """
    x = _apply(Embedding, config, params["token_embedder"], tokens)
    encoded, _ = _apply(Encoder, config, params["encoder"], x, segments, {}, run_to_top=True, deterministic=True)
    return encoded


def cross_keys_values(config: T5Config, params: Any, encoded: jax.Array) -> KeysValues:
    """Keys and values of the encoder's output in every decoder layer; the same at every token, so computed once.

    Each is [layers, batch, num_heads, source, head_dim].
    """
    layers = params["decoder"]["layers"]["encoder_decoder_attention"]

    def of_layer(layer_params: Any) -> KeysValues:
        return _apply(Attention, config, layer_params, encoded, method="keys_values")

    if config.scan_layers:
        return jax.lax.map(of_layer, layers)
    found = [of_layer(_take(layers, index)) for index in range(config.num_decoder_layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def decode_step(
    config: T5Config, params: Any, cache: Cache, cross: KeysValues, tokens: jax.Array, encoder_segments: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads one token of each example, and says what may follow.

    Args:
        config: the model's settings.
        params: all its parameters.
        cache: of the tokens before; must not be full.
        cross: from `cross_keys_values`.
        tokens: int [batch], `START_TOKEN` first.
        encoder_segments: int [batch, source], 0 is padding.

    Returns:
        float32 logits [batch, vocab_size], and the cache with these tokens in it.
    """
    length = cache.kept.key.shape[3]
    bias_of_decoder = functools.partial(RelativePositionBias, bidirectional=False)
    bias = _apply(bias_of_decoder, config, params["decoder"]["relpos_bias"], cache.index, length, method="row")
    mask = jnp.arange(length) <= cache.index  # [max_length]
    cross_mask = (encoder_segments != 0)[:, None, None]  # [batch, 1, 1, source]

    def run_layer(carry: tuple[jax.Array, KeysValues], xs: tuple) -> tuple[tuple[jax.Array, KeysValues], None]:
        x, kept = carry
        index, layer_params, layer_cross = xs

        def write(new: KeysValues) -> tuple[KeysValues, KeysValues]:
            # Into the whole stack, where the compiler can do it in place: a loop that returned each layer's part would
            # copy all of it at every token.
            start = (index, 0, 0, cache.index, 0)
            written = jax.tree.map(lambda all_, one: jax.lax.dynamic_update_slice(all_, one[None], start), kept, new)
            return _take(written, index), written

        arguments = (x, write, layer_cross, mask, bias, cross_mask)
        return _apply(DecoderLayer, config, layer_params, *arguments, method="step"), None

    xs = (jnp.arange(config.num_decoder_layers), params["decoder"]["layers"], cross)
    carry = (_apply(Embedding, config, params["token_embedder"], tokens[:, None]), cache.kept)
    if config.scan_layers:
        carry, _ = jax.lax.scan(run_layer, carry, xs)
    else:
        for index in range(config.num_decoder_layers):
            carry, _ = run_layer(carry, (index, *_take(xs[1:], index)))
    x, kept = carry
    return _logits(config, params, x)[:, 0], Cache(kept=kept, index=cache.index + 1)


def search(
    config: T5Config,
    params: Any,
    batch: Batch,
    max_length: int,
    eos_id: int,
    choose: Callable[[jax.Array, SearchState], jax.Array],
) -> SearchState:
    """Generates until every example has ended or `max_length` tokens were generated.

    Args:
        config: the model's settings.
        params: all its parameters.
        batch: `encoder_input_tokens` [batch, source]; not packed.
        max_length: tokens generated at most, the end included.
        eos_id: the token that ends an example.
        choose: from float32 logits [batch, vocab_size] and the state before, the next token of each example.

    Raises:
        UserError: if the batch is packed.
    """
    if "encoder_segment_ids" in batch:
        raise UserError("text is generated for one example a row, and this batch is packed; give it unpacked")
    segments = segment_ids(batch, "encoder")
    encoded = encode(config, params, batch["encoder_input_tokens"], segments)
    cross = cross_keys_values(config, params, encoded)
    rows = len(segments)

    def unfinished(state: SearchState) -> jax.Array:
        return (state.cache.index < max_length) & ~jnp.all(state.finished)

    def generate(state: SearchState) -> SearchState:
        logits, cache = decode_step(config, params, state.cache, cross, state.token, segments)
        token = jnp.where(state.finished, 0, choose(logits, state))
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.cache.index))
        return SearchState(cache, token, tokens, state.finished | (token == eos_id))

    start = SearchState(
        cache=init_cache(config, rows, max_length),
        token=jnp.full(rows, START_TOKEN, jnp.int32),
        tokens=jnp.zeros((rows, max_length), jnp.int32),
        finished=jnp.zeros(rows, bool),
    )
    return jax.lax.while_loop(unfinished, generate, start)


@functools.partial(jax.jit, static_argnames=("config", "max_length", "eos_id"))
def greedy(config: T5Config, params: Any, batch: Batch, max_length: int, eos_id: int = 1) -> jax.Array:
    """The most likely token at every step: int32 [batch, max_length], up to and with `eos_id`, then padding (0)."""

    def most_likely(logits: jax.Array, state: SearchState) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return search(config, params, batch, max_length, eos_id, most_likely).tokens


def _logits(config: T5Config, params: Any, x: jax.Array) -> jax.Array:
    x = _apply(RMSNorm, config, params["decoder"]["decoder_norm"], x)
    if config.tied_head:
        return apply_head(_apply(Embedding, config, params["token_embedder"], x, method="head"))
    return apply_head(_apply(Head, config, params["decoder"]["logits_dense"], x))


def _apply(module: Callable[..., nn.Module], config: T5Config, params: Any, *args: Any, **kwargs: Any) -> Any:
    # No parent, so that these functions may be called from within other modules.
    return module(config, parent=None).apply({"params": params}, *args, **kwargs)


def _take(tree: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
