"""Which tensors of a Hugging Face T5 make up which of our parameters."""

import dataclasses
from collections.abc import Iterator

from endistill_jax.model.config import T5Config

EMBEDDING = "shared.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
# Early exports carry a cross-attention position bias that no T5 uses; transformers ignores it as well.
IGNORED = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})

_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One of our parameters and the tensors it is made of.

    Attributes:
        path: where it lies in our nested dictionaries, layers stacked.
        tensors: Hugging Face names: one, or one a layer when `stacked`.
        shape: of one tensor in our orientation, [in, out] for kernels.
        transposed: whether the tensor lies the other way round, as torch keeps kernels.
        stacked: whether our parameter has a leading axis of layers.
    """

    path: tuple[str, ...]
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    stacked: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor as Hugging Face keeps it."""
        return self.shape[::-1] if self.transposed else self.shape


def entries(config: T5Config) -> Iterator[Entry]:
    """Every parameter of a model, in the order of computation."""
    yield _single(("token_embedder", "embedding"), EMBEDDING, (config.vocab_size, config.d_model), transposed=False)
    yield from _stack(config, "encoder", config.num_encoder_layers)
    yield from _stack(config, "decoder", config.num_decoder_layers)
    if not config.tied_head:
        path = ("decoder", "logits_dense", "kernel")
        yield _single(path, HEAD, (config.d_model, config.vocab_size), transposed=True)


def _stack(config: T5Config, stack: str, depth: int) -> Iterator[Entry]:
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = (config.num_heads, config.relative_buckets)
    yield _single((stack, "relpos_bias", "rel_embedding"), bias, shape, transposed=True)
    for ours, theirs, shape in _layer(config, stack):
        yield Entry(
            path=(stack, "layers", *ours),
            tensors=tuple(f"{stack}.block.{index}.layer.{theirs}.weight" for index in range(depth)),
            shape=shape,
            transposed=len(shape) == 2,
            stacked=True,
        )
    norm = (stack, f"{stack}_norm", "scale")
    yield _single(norm, f"{stack}.final_layer_norm.weight", (config.d_model,), transposed=False)


def _layer(config: T5Config, stack: str) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """(our path within a layer, Hugging Face's, our shape) of everything in one layer."""
    attention = {
        "encoder": (("attention", "pre_attention_layer_norm", "SelfAttention"),),
        "decoder": (
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ),
    }[stack]
    width, inner = config.d_model, config.inner_dim
    for index, (module, norm, theirs) in enumerate(attention):
        yield (norm, "scale"), f"{index}.layer_norm", (width,)
        for name, letter in _ATTENTION.items():
            shape = (inner, width) if name == "out" else (width, inner)
            yield (module, name, "kernel"), f"{index}.{theirs}.{letter}", shape
    index = len(attention)
    yield ("pre_mlp_layer_norm", "scale"), f"{index}.layer_norm", (width,)
    for name in ("wi_0", "wi_1") if len(config.mlp_activations) == 2 else ("wi",):
        yield ("mlp", name, "kernel"), f"{index}.DenseReluDense.{name}", (width, config.mlp_dim)
    yield ("mlp", "wo", "kernel"), f"{index}.DenseReluDense.wo", (config.mlp_dim, width)


def _single(path: tuple[str, ...], tensor: str, shape: tuple[int, ...], *, transposed: bool) -> Entry:
    return Entry(path=path, tensors=(tensor,), shape=shape, transposed=transposed, stacked=False)
