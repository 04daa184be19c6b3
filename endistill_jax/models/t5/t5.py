"""T5 as a pure function of (parameters, batch), with attention taps.

The forward pass is told which layer of which attention site to expose and returns just that layer's queries, keys and
values; nothing above the highest thing that is read is computed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from endistill_jax.core.batch import Batch, segment_ids, visible_keys
from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.blocks import DecoderLayer, EncoderLayer
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.layers import RelativePositionBias, RMSNorm, Tap, project
from endistill_jax.models.t5.stack import run_layers, stacked_init

SITES = ("encoder_self", "decoder_self", "cross")


class UnappliedHead(NamedTuple):
    """A head whose logits, `hidden @ kernel`, are left to whoever needs only some of them at a time.

    Attributes:
        hidden: [batch, target, d_model], what the head is applied to.
        kernel: [d_model, vocab_size].
    """

    hidden: jax.Array
    kernel: jax.Array


class Output(NamedTuple):
    """What a forward pass returns.

    Attributes:
        encoded: [batch, source, d_model], after the encoder's final normalisation; None if nothing reads it.
        logits: [batch, target, vocab_size], float32; None unless asked for.
        taps: the queries, keys and values of each site asked for.
        head: in place of logits, if it was asked not to be applied.
    """

    encoded: jax.Array | None
    logits: jax.Array | None
    taps: dict[str, Tap]
    head: UnappliedHead | None = None


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
        # First as the table lies, then as activations lie: in one step the compiler would give everything to everyone.
        x = nn.with_logical_constraint(x, ("lookup_batch", "length", "embed"))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))

    def head(self, x: jax.Array) -> UnappliedHead:
        """v1.0's head: the table itself, applied to [batch, length, d_model] scaled by d_model ** -0.5."""
        return UnappliedHead(x * jnp.asarray(self.config.d_model**-0.5, x.dtype), self.embedding.T)


class Head(nn.Module):
    """v1.1's own head, for [batch, length, d_model]."""

    config: T5Config

    @nn.compact
    def __call__(self, x: jax.Array) -> UnappliedHead:
        cfg = self.config
        stddev = cfg.head_init_scale * cfg.d_model**-0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("embed", "vocab"))
        return UnappliedHead(x, self.param("kernel", init, (cfg.d_model, cfg.vocab_size), jnp.float32))


def apply_head(head: UnappliedHead) -> jax.Array:
    """The logits: [batch, length, vocab_size], float32, from factors of the hidden states' type."""
    return project(head.hidden, head.kernel, head.hidden.dtype, jnp.float32)


class Encoder(nn.Module):
    """Position bias, layers, final normalisation."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        segments: jax.Array,
        tap_layers: Mapping[str, int],
        run_to_top: bool,
        deterministic: bool,
        frozen: bool,
    ) -> tuple[jax.Array, dict[str, Tap]]:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout_rate)
        bias = RelativePositionBias(cfg, bidirectional=True, name="relpos_bias")(x.shape[1], x.shape[1])
        context = (visible_keys(segments, segments, causal=False)[:, None], bias)
        x = drop(x, deterministic=deterministic)
        layer = EncoderLayer(cfg, parent=None)
        params = self.param("layers", stacked_init(layer, cfg.num_encoder_layers), x, context)
        key = None if deterministic or not cfg.dropout_rate else self.make_rng("dropout")
        x, taps = run_layers(layer, params, x, context, tap_layers, run_to_top, key, frozen)
        return drop(RMSNorm(cfg, name="encoder_norm")(x), deterministic=deterministic), taps


class Decoder(nn.Module):
    """Position bias, layers, final normalisation and head.

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
        tap_layers: Mapping[str, int],
        with_head: bool,
        deterministic: bool,
        frozen: bool,
    ) -> tuple[UnappliedHead | None, dict[str, Tap]]:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout_rate)
        length = x.shape[1]
        bias = RelativePositionBias(cfg, bidirectional=False, name="relpos_bias")(length, length)
        self_mask = visible_keys(segments, segments, causal=True)[:, None]
        context = (encoded, self_mask, bias, visible_keys(segments, encoder_segments, causal=False)[:, None])
        x = drop(x, deterministic=deterministic)
        layer = DecoderLayer(cfg, parent=None)
        params = self.param("layers", stacked_init(layer, cfg.num_decoder_layers), x, context)
        key = None if deterministic or not cfg.dropout_rate else self.make_rng("dropout")
        x, taps = run_layers(layer, params, x, context, tap_layers, with_head, key, frozen)
        if not with_head:
            return None, taps
        x = drop(RMSNorm(cfg, name="decoder_norm")(x), deterministic=deterministic)
        return self.token_embedder.head(x) if cfg.tied_head else Head(cfg, name="logits_dense")(x), taps


class T5(nn.Module):
    """An encoder-decoder model; call it through `T5(config).apply({"params": params}, batch, ...)`."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        *,
        tap_layers: Mapping[str, int] | None = None,
        with_logits: bool = True,
        with_head: bool = False,
        deterministic: bool = True,
        frozen: bool = False,
    ) -> Output:
        """One forward pass with teacher forcing.

        Args:
            batch: integer arrays by SeqIO's feature names: `encoder_input_tokens` [batch, source] and, unless only the
                encoder is tapped, `decoder_input_tokens` and `decoder_target_tokens` [batch, target]; when examples are
                packed, `encoder_segment_ids` and `decoder_segment_ids` of the same shapes. Token 0 is padding.
            tap_layers: site (`encoder_self`, `decoder_self`, `cross`) -> layer to expose; negative counts from the top.
            with_logits: whether logits are read.
            with_head: return the head unapplied instead of logits, whatever `with_logits` says.
            deterministic: no dropout; else a "dropout" key must be given in `rngs`.
            frozen: the parameters are constants; see `run_layers`.

        Raises:
            UserError: if a site is unknown or a layer does not exist.
        """
        cfg = self.config
        taps = resolve_tap_layers(cfg, tap_layers or {})
        encoder_taps = {site: index for site, index in taps.items() if site == "encoder_self"}
        decoder_taps = {site: index for site, index in taps.items() if site != "encoder_self"}
        read_head = with_logits or with_head
        run_decoder = read_head or bool(decoder_taps)

        embedder = Embedding(cfg, name="token_embedder")
        encoder_segments = segment_ids(batch, "encoder")
        x = embedder(batch["encoder_input_tokens"])
        encoder = Encoder(cfg, name="encoder")
        encoded, exposed = encoder(x, encoder_segments, encoder_taps, run_decoder, deterministic, frozen)
        if not run_decoder:
            return Output(encoded=None, logits=None, taps=exposed)
        x = embedder(batch["decoder_input_tokens"])
        decoder = Decoder(cfg, embedder, name="decoder")
        segments = segment_ids(batch, "decoder")
        head, decoder_exposed = decoder(
            x, encoded, segments, encoder_segments, decoder_taps, read_head, deterministic, frozen
        )
        exposed |= decoder_exposed
        if with_head or not with_logits:
            return Output(encoded=encoded, logits=None, taps=exposed, head=head)
        logits = nn.with_logical_constraint(apply_head(head), ("batch", "length", "vocab"))
        return Output(encoded=encoded, logits=logits, taps=exposed)


def resolve_tap_layers(config: T5Config, tap_layers: Mapping[str, int]) -> dict[str, int]:
    """Checks the sites and turns negative layer indices into positive ones.

    Raises:
        UserError: if a site is unknown or a layer does not exist.
    """
    resolved = {}
    for site, index in tap_layers.items():
        if site not in SITES:
            raise UserError(f"unknown attention site {site!r}; the sites are {', '.join(SITES)}")
        depth = config.num_encoder_layers if site == "encoder_self" else config.num_decoder_layers
        if not -depth <= index < depth:
            raise UserError(f"layer {index} of {site} does not exist; the stack has layers 0 to {depth - 1} (or -1)")
        resolved[site] = index % depth
    return resolved


def boxed_init(config: T5Config, key: jax.Array) -> Any:
    """Parameters in Flax's boxes, which carry the logical axis names; see `sharding.py`."""
    tokens = jnp.ones((1, 2), jnp.int32)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return T5(config, parent=None).init({"params": key}, dict.fromkeys(names, tokens))["params"]


def init_params(config: T5Config, key: jax.Array) -> Any:
    """Freshly initialised float32 parameters: a nested dict of arrays, layers stacked on a leading axis."""
    return nn.meta.unbox(boxed_init(config, key))


def count_params(params: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
