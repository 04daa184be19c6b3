"""T5 as a pure function of (parameters, batch), with attention taps.

The caller requests outputs (`core.outputs.Reads`): attention vectors or residual streams of some layers, the encoder's
output, the head. Nothing above the highest of them is computed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from endistill_jax.core.batch import Batch, segment_ids, visible_keys
from endistill_jax.core.outputs import LOGITS, Head, Output, Reads
from endistill_jax.models.t5.blocks import DecoderLayer, EncoderLayer
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.layers import RelativePositionBias, RMSNorm
from endistill_jax.models.t5.stack import StackReads, check_reads, run_layers, stack_reads, stacked_init


class Embedding(nn.Module):
    """The token table, shared by encoder and decoder (and, when tied, by the head)."""

    config: T5Config

    def setup(self):
        cfg = self.config
        stddev = cfg.head_init_scale if cfg.tied_head else 1.0
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (cfg.vocab_size, cfg.d_model), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        # First sharded like the table, then like activations: in one step the compiler would all-gather.
        x = nn.with_logical_constraint(x, ("lookup_batch", "length", "embed"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))

    def head(self, x: jax.Array) -> Head:
        """v1.0's head: the table itself, applied to [batch, length, d_model] scaled by d_model ** -0.5."""
        return Head(x * jnp.asarray(self.config.d_model**-0.5, x.dtype), self.embedding.T)


class OutputHead(nn.Module):
    """v1.1's own head, for [batch, length, d_model]."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> Head:
        cfg = self.config
        stddev = cfg.head_init_scale * cfg.d_model**-0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("embed", "vocab"))
        return Head(x, self.param("kernel", init, (cfg.d_model, cfg.vocab_size), jnp.float32))


class Encoder(nn.Module):
    """Position bias, layers, final normalization."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segments: jax.Array,
        reads: StackReads,
        deterministic: bool,
        frozen: bool,
    ) -> tuple[jax.Array, Output]:
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
    """Position bias, layers, final normalization and head.

    Attributes:
        config: the model's settings.
        token_embedder: the shared table, which is the head too when the head is tied.
    """

    config: T5Config
    token_embedder: nn.Module

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        segments: jax.Array,
        encoder_segments: jax.Array,
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
        """One forward pass with teacher forcing.

        Args:
            batch: integer arrays by SeqIO's feature names: `encoder_input_tokens` [batch, source] and, unless only the
                encoder is read, `decoder_input_tokens` and `decoder_target_tokens` [batch, target]; when examples are
                packed, `encoder_segment_ids` and `decoder_segment_ids` of the same shapes. Token 0 is padding.
            reads: what to return, and with that, what to compute.
            deterministic: no dropout; else a "dropout" key must be given in `rngs`.
            frozen: the parameters are constants; see `run_layers`.

        Raises:
            UserError: if a layer, or the decoder, does not exist.
        """
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


def boxed_init(config: T5Config, key: jax.Array) -> Any:
    """Parameters in Flax's boxes, which carry the logical axis names; see `sharding.py`."""
    tokens = jnp.ones((1, 2), jnp.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    reads = LOGITS if config.num_decoder_layers else Reads(encoded=True)
    return T5(config, parent=None).init({"params": key}, dict.fromkeys(names, tokens), reads)["params"]
