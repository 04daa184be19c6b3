"""Which tensor of a Hugging Face T5 is which of our parameters."""

from typing import NamedTuple

from endistill_jax.checkpoints.interchange import Parameter

EMBEDDING = "shared.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
# Early exports carry a cross-attention position bias that no T5 uses; transformers ignores it as well.
IGNORED = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})

_MODULES = {
    ("encoder", "attention"): "0.SelfAttention",
    ("encoder", "pre_attention_layer_norm"): "0.layer_norm",
    ("encoder", "mlp"): "1.DenseReluDense",
    ("encoder", "pre_mlp_layer_norm"): "1.layer_norm",
    ("decoder", "self_attention"): "0.SelfAttention",
    ("decoder", "pre_self_attention_layer_norm"): "0.layer_norm",
    ("decoder", "encoder_decoder_attention"): "1.EncDecAttention",
    ("decoder", "pre_cross_attention_layer_norm"): "1.layer_norm",
    ("decoder", "mlp"): "2.DenseReluDense",
    ("decoder", "pre_mlp_layer_norm"): "2.layer_norm",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


class Tensor(NamedTuple):
    """A tensor as Hugging Face keeps it.

    Attributes:
        name: such as `encoder.block.0.layer.0.SelfAttention.q.weight`.
        shape: there.
        transposed: whether it lies the other way round than ours, as torch keeps kernels.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool


def tensor_of(parameter: Parameter) -> Tensor:
    """Where Hugging Face keeps a parameter."""
    # The embedding is [vocab, embed] on both sides, and vectors have one way to lie.
    transposed = parameter.path[-1] in ("kernel", "rel_embedding")
    shape = parameter.shape[::-1] if transposed else parameter.shape
    return Tensor(_name(parameter), shape, transposed)


def _name(parameter: Parameter) -> str:
    stack, module, *rest = parameter.path
    if stack == "token_embedder":
        return EMBEDDING
    if module == "logits_dense":
        return HEAD
    if module == "relpos_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    if module == f"{stack}_norm":
        return f"{stack}.final_layer_norm.weight"
    within, *projection, _ = rest  # "layers", then for instance mlp, wi_0, kernel or pre_mlp_layer_norm, scale
    parts = [_MODULES[stack, within], *(_PROJECTIONS.get(name, name) for name in projection), "weight"]
    return f"{stack}.block.{parameter.layer}.layer.{'.'.join(parts)}"
