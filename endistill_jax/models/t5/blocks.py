"""One layer of each stack: residual blocks of attention and MLP.

A layer is given its stack's position bias, or has its own (umT5) and is given None.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from endistill_jax.core.outputs import Tap
from endistill_jax.models.t5.config import T5Config
from endistill_jax.models.t5.layers import MLP, Attention, KeysValues, RelativePositionBias, RMSNorm


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each on a normalized input and added to the residual stream."""

    config: T5Config

    @nn.compact
    def __call__(self, x, mask, position_bias, deterministic: bool) -> tuple[jax.Array, dict[str, Tap]]:
        cfg = self.config
        drop = nn.Dropout(cfg.dropout_rate)
        if cfg.bias_per_layer:
            position_bias = RelativePositionBias(cfg, bidirectional=True, name="relpos_bias")(x.shape[1], x.shape[1])
        y = RMSNorm(cfg, name="pre_attention_layer_norm")(x)
        y, tap = Attention(cfg, name="attention")(y, y, mask, position_bias, deterministic)
        x = x + drop(y, deterministic=deterministic)
        y = RMSNorm(cfg, name="pre_mlp_layer_norm")(x)
        x = x + drop(MLP(cfg, name="mlp")(y, deterministic), deterministic=deterministic)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_activation")), {"encoder_self": tap}


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, and MLP."""

    config: T5Config

    def setup(self):
        cfg = self.config
        self.pre_self_attention_layer_norm = RMSNorm(cfg)
        self.self_attention = Attention(cfg)
        self.pre_cross_attention_layer_norm = RMSNorm(cfg)
        self.encoder_decoder_attention = Attention(cfg)
        self.pre_mlp_layer_norm = RMSNorm(cfg)
        self.mlp = MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout_rate)
        if cfg.bias_per_layer:
            self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)

    def __call__(
        self, x, encoded, mask, position_bias, cross_mask, deterministic: bool
    ) -> tuple[jax.Array, dict[str, Tap]]:
        if self.config.bias_per_layer:
            position_bias = self.relpos_bias(x.shape[1], x.shape[1])
        x, self_tap, cross_tap = self._blocks(
            x,
            lambda y: self.self_attention(y, y, mask, position_bias, deterministic),
            lambda y: self.encoder_decoder_attention(y, encoded, cross_mask, None, deterministic),
            deterministic,
        )
        return x, {"decoder_self": self_tap, "cross": cross_tap}

    def step(
        self,
        x,
        write: Callable[[KeysValues], tuple[KeysValues, Any]],
        cross: KeysValues,
        mask,
        position_bias,
        cross_mask,
    ) -> tuple[jax.Array, Any]:
        """The same for one further token [batch, 1, d_model], without dropout.

        `write` is given the token's keys and values; it returns those of all tokens so far and whatever it wrote them
        into, which is returned. `cross` are the keys and values of the encoder's output.
        """

        def attend_to_past(y: jax.Array) -> tuple[jax.Array, Any]:
            past, written = write(self.self_attention.keys_values(y))
            return self.self_attention.attend(y, past, mask, position_bias), written

        def attend_to_encoder(y: jax.Array) -> tuple[jax.Array, None]:
            return self.encoder_decoder_attention.attend(y, cross, cross_mask, None), None

        x, written, _ = self._blocks(x, attend_to_past, attend_to_encoder, deterministic=True)
        return x, written

    def _blocks(self, x, self_attention, cross_attention, deterministic: bool) -> tuple[jax.Array, Any, Any]:
        """The three residual blocks; the two attentions take a normalized input and return output and extras."""
        y, self_extras = self_attention(self.pre_self_attention_layer_norm(x))
        x = x + self.dropout(y, deterministic=deterministic)
        y, cross_extras = cross_attention(self.pre_cross_attention_layer_norm(x))
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))
        return x, self_extras, cross_extras
