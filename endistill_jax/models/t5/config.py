"""The shape of a T5 model: everything needed to build it, nothing about how it is trained."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from endistill_jax.core.attention import Stack
from endistill_jax.core.errors import DTYPES, require, require_at_least, require_choice

if TYPE_CHECKING:
    from endistill_jax.models.family import Family

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "linear")
# Left out of manifests at these defaults, so that checkpoints from before stay equal to those from now.
_ADDED_LATER = {"bias_per_layer": False, "pad_id": 0, "eos_id": 1, "decoder_start_id": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Architecture and execution settings of a T5: v1.0, v1.1, umT5, or an encoder alone."""

    vocab_size: int  # rows of the embedding table; may exceed the tokenizer's size (T5 pads 32,100 to 32,128)
    d_model: int  # width of the residual stream
    num_heads: int
    head_dim: int  # of one head; `num_heads * head_dim` need not equal `d_model`
    mlp_dim: int  # width of the feed-forward layer
    num_encoder_layers: int
    num_decoder_layers: int  # independent of the encoder's; 0 makes a model of an encoder alone
    # One name for a plain MLP (v1.0: `("relu",)`), two for a gated one whose branches are multiplied. "gelu" is the
    # tanh form that T5 uses, "gelu_exact" the error-function form.
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    # v1.0 reuses the embedding as head and scales its input by `d_model ** -0.5`; v1.1 has its own head.
    tied_head: bool = False
    dropout_rate: float = 0.0  # on embeddings, attention weights, MLP hidden units and residual branches, as in T5
    relative_buckets: int = 32  # of a position bias
    relative_max_distance: int = 128  # distances from here on share a bucket
    layer_norm_epsilon: float = 1e-6  # added to the mean square in the normalizations
    head_init_scale: float = 1.0  # factor on the initial standard deviation of the head (of the embedding when tied)
    # Of activations and matrix products; parameters keep their own type, softmax and logits are float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # Run layers in a compiled loop, so that program size does not grow with depth. Parameters are stored the same way.
    scan_layers: bool = True
    # What the backward pass keeps of a layer: "none" recomputes nothing, "dots" keeps products with weights only,
    # "full" keeps the layer's input only.
    remat: Literal["none", "dots", "full"] = "none"
    # Most that the float32 scores of an attention module take at a time on a device, or those of two heads of one
    # example; the backward pass computes them again. None computes all at once, as dropout does.
    attention_bytes: int | None = None
    bias_per_layer: bool = False  # a position bias of its own in every layer (umT5), rather than one for a whole stack
    pad_id: int = 0  # fills up inputs and outputs of generation; in SeqIO's batches that is always token 0
    eos_id: int = 1  # ends a text
    decoder_start_id: int = 0  # the decoder's first input

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        require_at_least(self, 1, "vocab_size", "d_model", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers")
        require_at_least(self, 0, "num_decoder_layers")
        require_choice(self, dtype=DTYPES, remat=("none", "dots", "full"))
        known = 1 <= len(self.mlp_activations) <= 2 and not set(self.mlp_activations) - set(ACTIVATIONS)
        require(self, "mlp_activations", known, f"give one or two of {ACTIVATIONS}")
        require(self, "dropout_rate", 0 <= self.dropout_rate < 1, "it must be in [0, 1)")
        fits = self.relative_buckets >= 4 and self.relative_buckets % 4 == 0
        require(self, "relative_buckets", fits, "it must be a multiple of 4")
        fits = self.relative_max_distance > self.relative_buckets // 2
        require(self, "relative_max_distance", fits, f"it must exceed half of relative_buckets {self.relative_buckets}")
        if self.attention_bytes is not None:
            require_at_least(self, 1, "attention_bytes")
        for name in ("pad_id", "eos_id", "decoder_start_id"):
            fits = 0 <= getattr(self, name) < max(self.vocab_size, 2)
            require(self, name, fits, f"it must be a token of the vocabulary, 0 to {self.vocab_size - 1}")
        require(self, "eos_id", self.eos_id != self.pad_id, "pad_id too: the end of a text would look like padding")

    @property
    def family(self) -> "Family":
        from endistill_jax.models.t5.family import FAMILY  # which imports this module

        return FAMILY

    @property
    def inner_dim(self) -> int:
        return self.num_heads * self.head_dim

    def depth(self, stack: Stack) -> int:
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers

    def architecture(self) -> dict[str, object]:
        """The settings that decide parameters and function, as plain data; how the model is executed is left out."""
        left_out = {"dtype", "scan_layers", "remat", "attention_bytes", "dropout_rate", "head_init_scale"}
        left_out |= {name for name, default in _ADDED_LATER.items() if getattr(self, name) == default}
        plain = dataclasses.asdict(self) | {"mlp_activations": list(self.mlp_activations)}
        return {name: value for name, value in plain.items() if name not in left_out}
