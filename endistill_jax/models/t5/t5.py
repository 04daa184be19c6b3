"""T5 as a pure function of (parameters, batch) that computes what is requested (`core.model_io.Reads`) and no more.

A stack runs as segments: a compiled loop up to the tapped layer, that layer by itself, a loop over the rest. So
exposing one layer stacks nothing for the others, compile time does not grow with depth, and layers above the highest
tap are dead code that the compiler removes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from endistill_jax.core.attention import SITES, Stack, visible_keys
from endistill_jax.core.errors import UserError
from endistill_jax.core.model_io import LOGITS, Batch, Head, Output, Reads, Tap, resolve_layer, segment_ids
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.layers import DecoderLayer, EncoderLayer, RelativePositionBias, Residual, RMSNorm

_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class StackReads(NamedTuple):
    """The requested outputs of one stack: keys as requested -> index of the layer, from 0."""

    taps: Mapping[tuple[str, int], int]
    hidden: Mapping[tuple[str, int], int]
    to_top: bool  # whether the stack's output is read; else it ends with the highest layer that is


def check_reads(config: T5Config, reads: Reads) -> None:
    """Refuses to read a site that does not exist, or a decoder that the model does not have."""
    for site, _ in reads.taps:
        if site not in SITES:
            raise UserError(f"there is no attention site {site!r}; choose one of {', '.join(SITES)}")
    if reads.decoder and not config.num_decoder_layers:
        raise UserError("the model is an encoder alone (num_decoder_layers is 0): nothing of a decoder can be read")


def stack_reads(reads: Reads, stack: Stack, depth: int, *, to_top: bool) -> StackReads:
    """The part of `reads` that is of one stack of so many layers."""
    taps = {
        (site, layer): resolve_layer(layer, depth, site) for site, layer in reads.taps if SITES[site].stack == stack
    }
    hidden = {(name, layer): resolve_layer(layer, depth, name) for name, layer in reads.hidden if name == stack}
    return StackReads(taps, hidden, to_top)


def stacked_init(layer: nn.Module, num_layers: int) -> Callable[[jax.Array, jax.Array, tuple], Any]:
    """An initializer of `num_layers` layers, each with a key of its own, stacked on a leading axis named "layers"."""

    def init(key: Key[Array, ""], x: Residual, context: tuple) -> Any:
        def init_one(key: Key[Array, ""]) -> Any:
            return layer.init({"params": key}, x, *context, deterministic=True)["params"]

        stacked = jax.vmap(init_one)(jax.random.split(key, num_layers))
        return jax.tree.map(
            lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
            stacked,
            is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
        )

    return init


def run_layers(
    layer: nn.Module,
    params: Any,
    x: Residual,
    context: tuple,
    reads: StackReads,
    dropout_key: Key[Array, ""] | None,
    frozen: bool = False,
) -> tuple[Residual, Output]:
    """Runs the layers that are needed: the residual stream where the stack ended, and what is read of it.

    The layer is unbound; its call returns the new residual stream and its taps by site. Its parameters are stacked, and
    `context` are its further arrays (masks, bias, encoder output), the same for every layer. Without a key there is no
    dropout; `frozen` parameters are constants.
    """
    cfg = layer.config
    num_layers = len(jax.tree.leaves(params)[0])

    def apply(x: jax.Array, layer_params: Any, index: jax.Array) -> tuple[jax.Array, dict[str, Tap]]:
        rngs = {} if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, index)}
        return layer.apply({"params": layer_params}, x, *context, deterministic=dropout_key is None, rngs=rngs)

    looped = alone = apply
    if cfg.remat != "none":
        # Outside a loop the compiler would merge what is computed twice, and keep it after all.
        looped, alone = (
            jax.checkpoint(apply, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=prevent) for prevent in (False, True)
        )

    def apply_one(x: jax.Array, index: int) -> tuple[jax.Array, dict[str, Tap]]:
        return alone(x, jax.tree.map(lambda leaf: leaf[index], params), jnp.asarray(index))

    def layer_at(index: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params)

    def apply_segment(x: jax.Array, start: int, stop: int) -> jax.Array:
        if cfg.scan_layers and stop - start > 1 and frozen:
            # Indexes into all stacked parameters rather than slicing those of the segment; a gradient by the parameters
            # would take a pass over all of them per layer.
            indices = jnp.arange(start, stop)
            return jax.lax.scan(lambda x, index: (apply(x, layer_at(index), index)[0], None), x, indices)[0]
        if cfg.scan_layers and stop - start > 1:
            segment = jax.tree.map(lambda leaf: leaf[start:stop], params)
            return jax.lax.scan(lambda x, xs: (looped(x, *xs)[0], None), x, (segment, jnp.arange(start, stop)))[0]
        for index in range(start, stop):
            x, _ = apply_one(x, index)
        return x

    taps: dict[tuple[str, int], Tap] = {}
    hidden: dict[tuple[str, int], jax.Array] = {}
    done = 0
    for exposed_layer in sorted({*reads.taps.values(), *reads.hidden.values()}):
        x, exposed = apply_one(apply_segment(x, done, exposed_layer), exposed_layer)
        taps |= {key: exposed[key[0]] for key, index in reads.taps.items() if index == exposed_layer}
        hidden |= {key: x for key, index in reads.hidden.items() if index == exposed_layer}
        done = exposed_layer + 1
    if reads.to_top:
        x = apply_segment(x, done, num_layers)
    return x, Output(taps=taps, hidden=hidden)


class Embedding(nn.Module):
    """The token table, shared by encoder and decoder (and, when tied, by the head)."""

    config: T5Config

    def setup(self):
        cfg = self.config
        stddev = cfg.head_init_scale if cfg.tied_head else 1.0
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (cfg.vocab_size, cfg.d_model), jnp.float32)

    def __call__(self, tokens: Int[Array, "batch length"]) -> Residual:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        # First sharded like the table, then like activations: in one step the compiler would all-gather.
        x = nn.with_logical_constraint(x, ("lookup_batch", "length", "embed"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))

    def head(self, x: Residual) -> Head:
        """v1.0's head: the table itself, applied to states scaled by d_model ** -0.5."""
        return Head(x * jnp.asarray(self.config.d_model**-0.5, x.dtype), self.embedding.T)


class OutputHead(nn.Module):
    """v1.1's own head."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Residual) -> Head:
        cfg = self.config
        stddev = cfg.head_init_scale * cfg.d_model**-0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("embed", "vocab"))
        return Head(x, self.param("kernel", init, (cfg.d_model, cfg.vocab_size), jnp.float32))


class Encoder(nn.Module):
    """Position bias, layers, final normalization."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Residual, segments: Int[Array, "batch length"], reads: StackReads, deterministic: bool, frozen: bool
    ) -> tuple[Residual, Output]:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout_rate)
        bias = None
        if not cfg.bias_per_layer:
            bias = RelativePositionBias(cfg, bidirectional=True, name="relpos_bias")(x.shape[1], x.shape[1])
        context = (visible_keys(segments, segments, causal=False)[:, None], bias)
        x = drop(x, deterministic=deterministic)
        layer = EncoderLayer(cfg, parent=None)
        params = self.param("layers", stacked_init(layer, cfg.num_encoder_layers), x, context)
        key = None if deterministic or not cfg.dropout_rate else self.make_rng("dropout")
        x, exposed = run_layers(layer, params, x, context, reads, key, frozen)
        return drop(RMSNorm(cfg, name="encoder_norm")(x), deterministic=deterministic), exposed


class Decoder(nn.Module):
    """Position bias, layers, final normalization and head, which is the shared table when it is tied."""

    config: T5Config
    token_embedder: nn.Module

    @nn.compact
    def __call__(
        self,
        x: Residual,
        encoded: Float[Array, "batch source d_model"],
        segments: Int[Array, "batch length"],
        encoder_segments: Int[Array, "batch source"],
        reads: StackReads,
        deterministic: bool,
        frozen: bool,
    ) -> tuple[Head | None, Output]:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout_rate)
        length = x.shape[1]
        bias = None
        if not cfg.bias_per_layer:
            bias = RelativePositionBias(cfg, bidirectional=False, name="relpos_bias")(length, length)
        self_mask = visible_keys(segments, segments, causal=True)[:, None]
        context = (encoded, self_mask, bias, visible_keys(segments, encoder_segments, causal=False)[:, None])
        x = drop(x, deterministic=deterministic)
        layer = DecoderLayer(cfg, parent=None)
        params = self.param("layers", stacked_init(layer, cfg.num_decoder_layers), x, context)
        key = None if deterministic or not cfg.dropout_rate else self.make_rng("dropout")
        x, exposed = run_layers(layer, params, x, context, reads, key, frozen)
        if not reads.to_top:
            return None, exposed
        x = drop(RMSNorm(cfg, name="decoder_norm")(x), deterministic=deterministic)
        return self.token_embedder.head(x) if cfg.tied_head else OutputHead(cfg, name="logits_dense")(x), exposed


class T5(nn.Module):
    """An encoder-decoder, or an encoder alone; call it through `T5(config).apply({"params": params}, batch, ...)`."""

    config: T5Config

    @nn.compact
    def __call__(
        self, batch: Batch, reads: Reads = LOGITS, *, deterministic: bool = True, frozen: bool = False
    ) -> Output:
        """One forward pass with teacher forcing; with dropout if not deterministic, by the key "dropout" in `rngs`."""
        cfg = self.config
        check_reads(cfg, reads)
        of_encoder = stack_reads(reads, "encoder", cfg.num_encoder_layers, to_top=reads.encoded or reads.decoder)
        of_decoder = stack_reads(reads, "decoder", cfg.num_decoder_layers, to_top=reads.head)

        embedder = Embedding(cfg, name="token_embedder")
        encoder_segments = segment_ids(batch, "encoder")
        x = embedder(batch["encoder_input_tokens"])
        encoded, output = Encoder(cfg, name="encoder")(x, encoder_segments, of_encoder, deterministic, frozen)
        if of_encoder.to_top:
            output = output._replace(encoded=encoded)
        if not reads.decoder:
            return output
        x = embedder(batch["decoder_input_tokens"])
        decoder = Decoder(cfg, embedder, name="decoder")
        segments = segment_ids(batch, "decoder")
        head, exposed = decoder(x, encoded, segments, encoder_segments, of_decoder, deterministic, frozen)
        return output._replace(head=head, taps=output.taps | exposed.taps, hidden=output.hidden | exposed.hidden)


def boxed_init(config: T5Config, key: Key[Array, ""]) -> Any:
    """Parameters in Flax's boxes, which carry the logical axis names; see `sharding.py`."""
    tokens = jnp.ones((1, 2), jnp.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    reads = LOGITS if config.num_decoder_layers else Reads(encoded=True)
    return T5(config, parent=None).init({"params": key}, dict.fromkeys(names, tokens), reads)["params"]
