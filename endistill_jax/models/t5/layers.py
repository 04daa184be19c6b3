"""The layers of T5: normalization, projections, position bias, attention, feed-forward, and one layer of each stack."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from endistill_jax.core.model_io import Tap
from endistill_jax.models.t5.attention import Bias, Keys, Mask, Queries, attend, attend_in_groups
from endistill_jax.models.t5.config import T5Config

Residual = Float[Array, "batch length d_model"]
CrossMask = Bool[Array, "batch 1 #query source"]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


class KeysValues(NamedTuple):
    """Keys and values kept for later queries; stacks put layers first."""

    key: Float[Array, "*layers batch heads length head_dim"]
    value: Float[Array, "*layers batch heads length head_dim"]


class Linear(nn.Module):
    """A projection without bias, multiplied in `dtype`; `axes` are the logical names of the kernel's two axes."""

    features: int
    axes: tuple[str, str]
    stddev: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch length inputs"]) -> Float[Array, "batch length features"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.stddev), self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        # Batch and length are one axis in the product: XLA's CPU compiler otherwise transposes the activations for the
        # kernel's gradient, which made the backward pass of an MLP take three times as long.
        flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = jnp.dot(flat, kernel.astype(self.dtype), preferred_element_type=self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """T5's normalization: x / sqrt(mean(x^2) + epsilon) * scale, computed in float32; no mean, no bias."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Residual) -> Residual:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        dtype = jnp.dtype(self.config.dtype)
        return (x32 * jax.lax.rsqrt(mean_square + self.config.layer_norm_epsilon)).astype(dtype) * scale.astype(dtype)


class MLP(nn.Module):
    """Feed-forward layer, plain or gated: the product of its activated branches, projected back."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Residual, deterministic: bool) -> Residual:
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        hidden = None
        for index, activation in enumerate(cfg.mlp_activations):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{index}"
            branch = Linear(cfg.mlp_dim, ("embed", "mlp"), cfg.d_model**-0.5, dtype, name=name)(x)
            branch = _ACTIVATIONS[activation](branch)
            hidden = branch if hidden is None else hidden * branch
        hidden = nn.Dropout(cfg.dropout_rate)(hidden, deterministic=deterministic)
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        return Linear(cfg.d_model, ("mlp", "embed"), cfg.mlp_dim**-0.5, dtype, name="wo")(hidden)


class Attention(nn.Module):
    """Multi-head attention, T5's way: unscaled scores, an optional additive position bias, float32 softmax."""

    config: T5Config

    def setup(self):
        cfg = self.config

        def projection(stddev: float) -> Linear:
            return Linear(cfg.inner_dim, ("embed", "joined_kv"), stddev, jnp.dtype(cfg.dtype))

        # T5 folds the missing 1 / sqrt(head_dim) of the scores into the initial queries.
        self.query = projection((cfg.d_model * cfg.head_dim) ** -0.5)
        self.key = projection(cfg.d_model**-0.5)
        self.value = projection(cfg.d_model**-0.5)
        self.out = Linear(cfg.d_model, ("joined_kv", "embed"), cfg.inner_dim**-0.5, jnp.dtype(cfg.dtype))
        self.dropout = nn.Dropout(cfg.dropout_rate)

    def __call__(
        self,
        queries_from: Float[Array, "batch query d_model"],
        keys_from: Float[Array, "batch key d_model"],
        mask: Mask,
        position_bias: Bias | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch query d_model"], Tap]:
        """Attends from one sequence to another: the projected output, and the queries, keys and values it used."""
        projections = ((self.query, queries_from), (self.key, keys_from), (self.value, keys_from))
        tap = Tap(*(_constrained(project_from(x)) for project_from, x in projections), bias=position_bias)
        query, key, value = map(self.split_heads, tap[:3])
        return self._attend(query, key, value, mask, position_bias, deterministic), tap

    def keys_values(self, x: Residual) -> KeysValues:
        """Keys and values to be kept for `attend`."""
        return KeysValues(*(self.split_heads(_constrained(projection(x))) for projection in (self.key, self.value)))

    def attend(self, queries_from: Residual, kept: KeysValues, mask: Mask, position_bias: Bias | None) -> Residual:
        """As the call, without dropout, to keys and values that were kept."""
        query = self.split_heads(_constrained(self.query(queries_from)))
        return self._attend(query, *kept, mask, position_bias, deterministic=True)

    def split_heads(self, x: Float[Array, "batch length inner"]) -> Float[Array, "batch heads length head_dim"]:
        # Heads before length, so that both products of attention are plain batched matrix products.
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim).transpose(0, 2, 1, 3)

    def _attend(
        self, query: Queries, key: Keys, value: Keys, mask: Mask, position_bias: Bias | None, deterministic: bool
    ) -> Float[Array, "batch query d_model"]:
        cfg = self.config
        drops = cfg.dropout_rate > 0 and not deterministic
        if cfg.attention_bytes is None or drops:
            drop = functools.partial(self.dropout, deterministic=deterministic)
            attended = attend(query, key, value, mask, position_bias, drop)
        else:
            attended = attend_in_groups(query, key, value, mask, position_bias, cfg.attention_bytes)
        # [batch, num_heads, length, head_dim] -> [batch, length, num_heads * head_dim]
        attended = attended.transpose(0, 2, 1, 3)
        return self.out(attended.reshape(*attended.shape[:2], cfg.inner_dim))


def _constrained(projected: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(projected, ("batch", "length", "joined_kv"))


def relative_position_buckets(
    query_length: int, key_length: int, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of each (query, key) distance: [query_length, key_length] integers.

    The first half of the buckets holds exact distances, the rest grows logarithmically up to `max_distance`
    (Raffel et al., arXiv 1910.10683, section 2.1). Bidirectional stacks keep half of the buckets for keys to the right;
    causal ones put every key to the right in bucket 0.
    """
    distance = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]  # key minus query
    bucket = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        bucket = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 like the reference implementations, so that borderline distances fall into the same bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio /= np.float32(np.log(max_distance / exact))
    coarse = np.minimum(exact + (ratio * np.float32(buckets - exact)).astype(np.int32), buckets - 1)
    return bucket + np.where(distance < exact, distance, coarse)


class RelativePositionBias(nn.Module):
    """The position bias of a stack or of a layer, float32.

    Packed examples need no positions of their own: distances inside one example are those of the packed row.
    """

    config: T5Config
    bidirectional: bool

    def setup(self):
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.d_model**-0.5), ("heads", "relpos_buckets"))
        self.rel_embedding = self.param("rel_embedding", init, (cfg.num_heads, cfg.relative_buckets), jnp.float32)

    def __call__(self, query_length: int, key_length: int) -> Float[Array, "1 heads {query_length} {key_length}"]:
        return self._bias(self._buckets(query_length, key_length))

    def row(self, index: Int[Array, ""], length: int) -> Float[Array, "1 heads 1 {length}"]:
        """The causal bias of one query, the index-th, to `length` keys.

        Keys after it, which it may not see, have the bias of distance 0.
        """
        of_distance = jnp.asarray(self._buckets(length, 1)[:, 0])  # to key 0 the distance is the query's index
        return self._bias(of_distance[jnp.maximum(index - jnp.arange(length), 0)][None])

    def _buckets(self, query_length: int, key_length: int) -> np.ndarray:
        cfg = self.config
        limits = {"buckets": cfg.relative_buckets, "max_distance": cfg.relative_max_distance}
        return relative_position_buckets(query_length, key_length, bidirectional=self.bidirectional, **limits)

    def _bias(self, buckets: jax.Array | np.ndarray) -> Float[Array, "1 heads query key"]:
        # One-hot product instead of a gather: its gradient is a matrix product too, not a scatter.
        one_hot = jax.nn.one_hot(buckets, self.config.relative_buckets, dtype=jnp.float32)
        return jnp.einsum("hn,qkn->hqk", self.rel_embedding, one_hot)[None]


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each on a normalized input and added to the residual stream.

    `position_bias` is the stack's; None if each layer has its own (umT5).
    """

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Residual, mask: Mask, position_bias: Bias | None, deterministic: bool
    ) -> tuple[Residual, dict[str, Tap]]:
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
    """Causal self-attention, attention to the encoder's output, and MLP; `position_bias` as of `EncoderLayer`."""

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
        self,
        x: Residual,
        encoded: Float[Array, "batch source d_model"],
        mask: Mask,
        position_bias: Bias | None,
        cross_mask: CrossMask,
        deterministic: bool,
    ) -> tuple[Residual, dict[str, Tap]]:
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
        x: Float[Array, "batch beams d_model"],
        write: Callable[[KeysValues], tuple[KeysValues, Any]],
        cross: KeysValues,
        mask: Mask,
        position_bias: Bias | None,
        cross_mask: CrossMask,
    ) -> tuple[Float[Array, "batch beams d_model"], Any]:
        """The same for one further token of each beam, without dropout; `cross` are those of the encoder's output.

        `write` takes the token's keys and values; it returns those of all tokens so far, and what it wrote them into,
        which is returned.
        """

        def attend_to_past(y: jax.Array) -> tuple[jax.Array, Any]:
            past, written = write(self.self_attention.keys_values(y))
            return self.self_attention.attend(y, past, mask, position_bias), written

        def attend_to_encoder(y: jax.Array) -> tuple[jax.Array, None]:
            return self.encoder_decoder_attention.attend(y, cross, cross_mask, None), None

        x, written, _ = self._blocks(x, attend_to_past, attend_to_encoder, deterministic=True)
        return x, written

    def _blocks(self, x: Residual, self_attention, cross_attention, deterministic: bool) -> tuple[Residual, Any, Any]:
        """The three residual blocks; the two attentions take a normalized input and return output and extras."""
        y, self_extras = self_attention(self.pre_self_attention_layer_norm(x))
        x = x + self.dropout(y, deterministic=deterministic)
        y, cross_extras = cross_attention(self.pre_cross_attention_layer_norm(x))
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        x = x + self.dropout(y, deterministic=deterministic)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_activation"))
        return x, self_extras, cross_extras
