"""Incremental decoding with a cache of keys and values.

Everything here is a pure function of the stacked parameters. A search (`models.generation`) encodes once, computes the
encoder's keys and values once, and then repeats `read_tokens`. Beams of one example are several tokens at the same
position: they share the encoder's keys and values, and each sees, of the tokens before, those of its own hypothesis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from endistill_jax.core.model_io import LOGITS
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.layers import Attention, DecoderLayer, KeysValues, RelativePositionBias, RMSNorm
from endistill_jax.models.t5.t5 import Embedding, Encoder, OutputHead, StackReads, check_reads

# Of all layers: one array with the layers first, for a compiled loop over layers, or one entry a layer.
OfLayers = KeysValues | tuple[KeysValues, ...]


class Cache(NamedTuple):
    """The key-value cache of self-attention; its length is positions * beams, the beams of a position side by side."""

    kept: OfLayers
    index: Int[Array, ""]  # how many positions were read


class Source(NamedTuple):
    """The encoded input."""

    params: Any  # of the model, the decoder's layers split as the keys and values are
    cross: OfLayers  # of the encoder's output
    segments: Int[Array, "batch source"]  # 0 is padding


def init_cache(
    config: T5Config, batch_size: int, max_length: int, beams: int = 1, *, split: bool | None = None
) -> Cache:
    """An empty cache for `max_length` positions of each example.

    `split` by layers or all layers in one array; None splits where layers run one by one.
    """
    shape = (batch_size, config.num_heads, max_length * beams, config.head_dim)
    axes = ("batch", "heads", "length", None)

    def zeros(*layers: int) -> jax.Array:
        names = ("layers",) * len(layers) + axes
        return nn.with_logical_constraint(jnp.zeros((*layers, *shape), config.dtype), names)

    index = jnp.zeros((), jnp.int32)
    if not config.scan_layers if split is None else split:
        return Cache(tuple(KeysValues(zeros(), zeros()) for _ in range(config.num_decoder_layers)), index)
    return Cache(KeysValues(zeros(config.num_decoder_layers), zeros(config.num_decoder_layers)), index)


def encode(
    config: T5Config, params: Any, tokens: Int[Array, "batch source"], segments: Int[Array, "batch source"]
) -> Float[Array, "batch source d_model"]:
    """The encoder's output, without dropout."""
    x = _apply(Embedding, config, params["token_embedder"], tokens)
    reads = StackReads(taps={}, hidden={}, to_top=True)
    return _apply(Encoder, config, params["encoder"], x, segments, reads, deterministic=True, frozen=True)[0]


def cross_keys_values(config: T5Config, params: Any, encoded: Float[Array, "batch source d_model"]) -> KeysValues:
    """Keys and values of the encoder's output in every decoder layer, stacked; the same at every token."""
    layers = params["decoder"]["layers"]["encoder_decoder_attention"]

    def of_layer(layer_params: Any) -> KeysValues:
        return _apply(Attention, config, layer_params, encoded, method="keys_values")

    if config.scan_layers:
        return jax.lax.map(of_layer, layers)
    found = [of_layer(_take(layers, index)) for index in range(config.num_decoder_layers)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def read_source(config: T5Config, params: Any, tokens: Int[Array, "batch source"]) -> Source:
    """Encodes the input, once per search; `pad_id` is padding."""
    check_reads(config, LOGITS)
    segments = jnp.asarray(tokens != config.pad_id, jnp.int32)
    cross = cross_keys_values(config, params, encode(config, params, tokens, segments))
    if config.scan_layers:
        return Source(params, cross, segments)
    # Without a loop over layers, parameters are unstacked here once, rather than at every token.
    layers, cross = (
        tuple(_take(tree, layer) for layer in range(config.num_decoder_layers))
        for tree in (params["decoder"]["layers"], cross)
    )
    return Source({**params, "decoder": {**params["decoder"], "layers": layers}}, cross, segments)


def read_tokens(
    config: T5Config,
    source: Source,
    cache: Cache,
    tokens: Int[Array, "batch beams"],
    ancestors: Int[Array, "batch beams positions"] | None = None,
) -> tuple[Float[Array, "batch beams vocab"], Cache]:
    """Decodes one token of each beam of each example; see `models.family.Family`. `source` is split if the cache is."""
    params, beams = source.params, tokens.shape[1]
    x = _apply(Embedding, config, params["token_embedder"], tokens)
    mask = _self_attention_mask(cache, tokens, ancestors)
    bias_of_stack = None if config.bias_per_layer else _bias_row(config, params["decoder"], cache, beams)
    cross_mask = (source.segments != 0)[:, None, None]  # [batch, 1, 1, source]
    start = (0, 0, cache.index * beams, 0)

    def run(x: jax.Array, layer_params: Any, layer_cross: KeysValues, write: Callable) -> tuple[jax.Array, KeysValues]:
        bias = _bias_row(config, layer_params, cache, beams) if config.bias_per_layer else bias_of_stack
        return _apply(DecoderLayer, config, layer_params, x, write, layer_cross, mask, bias, cross_mask, method="step")

    def run_of_stack(carry: tuple[jax.Array, KeysValues], xs: tuple) -> tuple[tuple[jax.Array, KeysValues], None]:
        x, kept = carry
        layer, layer_params, layer_cross = xs

        def write(new: KeysValues) -> tuple[KeysValues, KeysValues]:
            # Written into the stacked cache, which the compiler can do in place; returning each layer's part from the
            # loop would copy the cache at every token.
            written = _write(kept, jax.tree.map(lambda one: one[None], new), (layer, *start))
            return _take(written, layer), written

        return run(x, layer_params, layer_cross, write), None

    layers = params["decoder"]["layers"]
    if not isinstance(cache.kept, KeysValues):
        kept = []
        for own, layer_params, layer_cross in zip(cache.kept, layers, source.cross, strict=True):
            x, written = run(x, layer_params, layer_cross, lambda new, own=own: (_write(own, new, start),) * 2)
            kept.append(written)
        kept = tuple(kept)
    else:
        xs = (jnp.arange(config.num_decoder_layers), layers, source.cross)
        carry = (x, cache.kept)
        if config.scan_layers:
            carry, _ = jax.lax.scan(run_of_stack, carry, xs)
        else:
            for layer in range(config.num_decoder_layers):
                carry, _ = run_of_stack(carry, (layer, *_take(xs[1:], layer)))
        x, kept = carry
    return _logits(config, params, x), Cache(kept=kept, index=cache.index + 1)


def _self_attention_mask(
    cache: Cache, tokens: Int[Array, "batch beams"], ancestors: Int[Array, "batch beams positions"] | None
) -> Bool[Array, "batch 1 #beams keys"]:
    """What a position sees of those before; keys are [positions, beams], flattened."""
    batch, beams = tokens.shape
    mask = jnp.arange(_positions(cache, beams)) <= cache.index
    if ancestors is None:
        return jnp.broadcast_to(mask, (batch, 1, 1, len(mask)))
    own = (ancestors[..., None] == jnp.arange(beams)) & mask[:, None]  # [batch, beams, positions, beams]
    return own.reshape(batch, 1, beams, -1)


def _bias_row(config: T5Config, owner: Any, cache: Cache, beams: int) -> Float[Array, "1 heads 1 keys"]:
    """The position bias of a stack's or a layer's parameters."""
    bias_of_decoder = functools.partial(RelativePositionBias, bidirectional=False)
    arguments = (cache.index, _positions(cache, beams))
    return jnp.repeat(_apply(bias_of_decoder, config, owner["relpos_bias"], *arguments, method="row"), beams, axis=-1)


def _positions(cache: Cache, beams: int) -> int:
    return jax.tree.leaves(cache.kept)[0].shape[-2] // beams


def _logits(config: T5Config, params: Any, x: Float[Array, "batch beams d_model"]) -> Float[Array, "batch beams vocab"]:
    x = _apply(RMSNorm, config, params["decoder"]["decoder_norm"], x)
    if config.tied_head:
        return _apply(Embedding, config, params["token_embedder"], x, method="head").logits()
    return _apply(OutputHead, config, params["decoder"]["logits_dense"], x).logits()


def _apply(module: Callable[..., nn.Module], config: T5Config, params: Any, *args: Any, **kwargs: Any) -> Any:
    # No parent, so that these functions may be called from within other modules.
    return module(config, parent=None).apply({"params": params}, *args, **kwargs)


def _take(tree: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _write(kept: KeysValues, new: KeysValues, start: tuple) -> KeysValues:
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_slice(all_, one, start), kept, new)
