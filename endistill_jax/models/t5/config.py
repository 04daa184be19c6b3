"""The shape of a T5 model: everything needed to build it, nothing about how it is trained."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from endistill_jax.core.attention import Stack
from endistill_jax.core.errors import UserError

if TYPE_CHECKING:
    from endistill_jax.models.family import Family

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "linear")
# Manifests from before these settings do not have them.
_ADDED_LATER = {"bias_per_layer": False, "pad_id": 0, "eos_id": 1, "decoder_start_id": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Architecture and execution settings of a T5: v1.0, v1.1, umT5, or an encoder alone.

    Attributes:
        vocab_size: rows of the embedding table; may exceed the tokenizer's size (T5 pads 32,100 to 32,128).
        d_model: width of the residual stream.
        num_heads: attention heads of every attention module.
        head_dim: size of one head; `num_heads * head_dim` need not equal `d_model`.
        mlp_dim: width of the feed-forward layer.
        num_encoder_layers: depth of the encoder.
        num_decoder_layers: depth of the decoder, independent of the encoder's; 0 makes a model of an encoder alone.
        mlp_activations: one name for a plain MLP (v1.0: `("relu",)`), two for a gated one whose branches are multiplied
            (v1.1: `("gelu", "linear")`). "gelu" is the tanh form that T5 uses, "gelu_exact" the error-function form.
        tied_head: v1.0 reuses the embedding as head and scales its input by `d_model ** -0.5`; v1.1 has its own head.
        dropout_rate: on embeddings, attention weights, MLP hidden units and residual branches, as in T5.
        relative_buckets: number of relative-position buckets of a position bias.
        relative_max_distance: distances from here on share a bucket.
        layer_norm_epsilon: added to the mean square in the normalizations.
        head_init_scale: factor on the initial standard deviation of the head (of the embedding when tied).
        dtype: type of activations and matrix products; parameters keep their own type, softmax and logits are float32.
        scan_layers: run layers in a compiled loop, so that program size does not grow with depth. Parameters are stored
            the same way whether or not the loop is used.
        remat: what the backward pass keeps of a layer: "none" recomputes nothing, "dots" keeps matrix products with
            weights only, "full" keeps the layer's input only.
        attention_bytes: most that the float32 scores of an attention module take at a time on a device, or those of
            two heads of one example; the backward pass computes them again. None computes all at once, as dropout does.
        bias_per_layer: a relative position bias of its own in every layer (umT5), rather than one for a whole stack.
        pad_id: the token that fills up what is generated from and what is generated; in batches of SeqIO that is always
            token 0.
        eos_id: the token that ends a text.
        decoder_start_id: the decoder's first input.
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
    bias_per_layer: bool = False
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in ("vocab_size", "d_model", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"T5Config.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_encoder_layers < 1:
            raise UserError(f"T5Config.num_encoder_layers is {self.num_encoder_layers}; it must be at least 1")
        if self.num_decoder_layers < 0:
            raise UserError(
                f"T5Config.num_decoder_layers is {self.num_decoder_layers}; give 0 for an encoder alone, or more"
            )
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
        for name in ("pad_id", "eos_id", "decoder_start_id"):
            if not 0 <= getattr(self, name) < max(self.vocab_size, 2):
                raise UserError(
                    f"T5Config.{name} is {getattr(self, name)}; it must be a token of the vocabulary, "
                    f"0 to {self.vocab_size - 1}"
                )
        if self.eos_id == self.pad_id:
            raise UserError(f"T5Config.eos_id is {self.eos_id}, as pad_id: an end could not be told from padding")

    @property
    def family(self) -> "Family":
        """What runs a model of these settings."""
        from endistill_jax.models.t5.family import FAMILY

        return FAMILY

    @property
    def inner_dim(self) -> int:
        """Width of the concatenated heads, which relation heads must divide."""
        return self.num_heads * self.head_dim

    def depth(self, stack: Stack) -> int:
        """How many layers a stack has."""
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers

    def architecture(self) -> dict[str, object]:
        """The settings that decide parameters and function, as plain data; how it is executed is left out.

        So is what was added later, where it has its default: checkpoints from before stay equal to those from now.
        """
        left_out = {"dtype", "scan_layers", "remat", "attention_bytes", "dropout_rate", "head_init_scale"}
        left_out |= {name for name, default in _ADDED_LATER.items() if getattr(self, name) == default}
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in left_out
        }
