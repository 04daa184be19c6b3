"""The shape of a T5 model: everything needed to build it, nothing about how it is trained."""

import dataclasses
from typing import Literal

from endistill_jax.core.errors import UserError

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Architecture and execution settings of a T5 v1.0 or v1.1 model.

    Attributes:
        vocab_size: rows of the embedding table; may exceed the tokenizer's size (T5 pads 32,100 to 32,128).
        d_model: width of the residual stream.
        num_heads: attention heads of every attention module.
        head_dim: size of one head; `num_heads * head_dim` need not equal `d_model`.
        mlp_dim: width of the feed-forward layer.
        num_encoder_layers: depth of the encoder.
        num_decoder_layers: depth of the decoder, independent of the encoder's.
        mlp_activations: one name for a plain MLP (v1.0: `("relu",)`), two for a gated one whose branches are multiplied
            (v1.1: `("gelu", "linear")`). "gelu" is the tanh form that T5 uses, "gelu_exact" the error-function form.
        tied_head: v1.0 reuses the embedding as head and scales its input by `d_model ** -0.5`; v1.1 has its own head.
        dropout_rate: on embeddings, attention weights, MLP hidden units and residual branches, as in T5.
        relative_buckets: number of relative-position buckets of each stack's one position bias.
        relative_max_distance: distances from here on share a bucket.
        layer_norm_epsilon: added to the mean square in the normalisations.
        head_init_scale: factor on the initial standard deviation of the head (of the embedding when tied).
        dtype: type of activations and matrix products; parameters keep their own type, softmax and logits are float32.
        scan_layers: run layers in a compiled loop, so that program size does not grow with depth. Parameters are stored
            the same way whether or not the loop is used.
        remat: what the backward pass keeps of a layer: "none" recomputes nothing, "dots" keeps matrix products with
            weights only, "full" keeps the layer's input only.
        attention_bytes: most that the float32 scores of an attention module take at a time on a device, or those of
            two heads of one example; the backward pass computes them again. None computes all at once, as dropout does.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tied_head: bool = False
    dropout_rate: float = 0.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    head_init_scale: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True
    remat: Literal["none", "dots", "full"] = "none"
    attention_bytes: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in ("vocab_size", "d_model", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"T5Config.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_encoder_layers", "num_decoder_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"T5Config.{name} is {getattr(self, name)}; a stack needs at least one layer")
        if not 1 <= len(self.mlp_activations) <= 2 or set(self.mlp_activations) - set(ACTIVATIONS):
            raise UserError(f"T5Config.mlp_activations is {self.mlp_activations}; give one or two of {ACTIVATIONS}")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"T5Config.dropout_rate is {self.dropout_rate}; it must be in [0, 1)")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise UserError(f"T5Config.relative_buckets is {self.relative_buckets}; it must be a multiple of 4")
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"T5Config.relative_max_distance is {self.relative_max_distance}; "
                f"it must exceed half of relative_buckets ({self.relative_buckets})"
            )
        if self.attention_bytes is not None and self.attention_bytes < 1:
            raise UserError(f"T5Config.attention_bytes is {self.attention_bytes}; it must be at least 1, or None")
        for name, choices in (("dtype", ("float32", "bfloat16")), ("remat", ("none", "dots", "full"))):
            if getattr(self, name) not in choices:
                raise UserError(f"T5Config.{name} is {getattr(self, name)!r}; choose one of {choices}")

    @property
    def inner_dim(self) -> int:
        """Width of the concatenated heads, which relation heads must divide."""
        return self.num_heads * self.head_dim

    def architecture(self) -> dict[str, object]:
        """The settings that decide parameters and function, as plain data; how it is executed is left out."""
        execution = {"dtype", "scan_layers", "remat", "attention_bytes", "dropout_rate", "head_init_scale"}
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in execution
        }
