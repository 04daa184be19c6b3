"""T5, mT5 and umT5 in Hugging Face folders: config.json, and which tensor there is which of our parameters.

An encoder alone is T5EncoderModel or UMT5EncoderModel there.
"""

import json
from collections.abc import Mapping
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import Parameter, Tensor
from endistill_jax.models.t5.config import T5Config

EMBEDDING = "shared.weight"
EMBEDDING_COPIES = {"encoder": "encoder.embed_tokens.weight", "decoder": "decoder.embed_tokens.weight"}
HEAD = "lm_head.weight"

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
# In transformers "gated-gelu" is the tanh form, and a plain "gelu" or any other gated one is the form it names.
_ACTIVATIONS = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gelu": ("gelu_exact",),
    "gelu_new": ("gelu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
# Our settings -> their name there and its default, None where it must be given.
_FIELDS = {
    "vocab_size": ("vocab_size", None),
    "d_model": ("d_model", None),
    "num_heads": ("num_heads", None),
    "head_dim": ("d_kv", None),
    "mlp_dim": ("d_ff", None),
    "num_encoder_layers": ("num_layers", None),
    "num_decoder_layers": ("num_decoder_layers", None),
    "dropout_rate": ("dropout_rate", 0.1),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6),
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_max_distance": ("relative_attention_max_distance", 128),
    "pad_id": ("pad_token_id", 0),
    "eos_id": ("eos_token_id", 1),
    "decoder_start_id": ("decoder_start_token_id", 0),
}
_NULL_IS_DEFAULT = ("num_decoder_layers", "pad_token_id", "eos_token_id", "decoder_start_token_id")
_CLASSES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
# Other accepted values of `architectures`; old folders omit it.
_OTHER_NAMES = {"t5": ("T5WithLMHeadModel",), "mt5": ("T5ForConditionalGeneration",), "umt5": ()}
_DEFAULT_ACTIVATION = {"t5": "relu", "mt5": "gated-gelu", "umt5": "gated-gelu"}


class T5InHuggingFace:
    """See `models.family.HuggingFaceFormat`."""

    model_types = tuple(_CLASSES)
    # Early exports carry a cross-attention position bias that no T5 uses; transformers ignores it as well.
    ignored = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})

    def config_from_json(self, raw: Mapping[str, Any], where: str) -> T5Config:
        kind, found = raw["model_type"], (raw.get("architectures") or [None])[0]
        whole, encoder = f"{_CLASSES[kind]}ForConditionalGeneration", f"{_CLASSES[kind]}EncoderModel"
        if found not in (whole, encoder, *_OTHER_NAMES[kind], None):
            raise UserError(f"{where} describes {found} (model_type {kind}); of these, {whole} and {encoder} are read")
        settings = _numbers(raw, where) | ({"num_decoder_layers": 0} if found == encoder else {})
        activation = raw.get("feed_forward_proj", _DEFAULT_ACTIVATION[kind])
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise UserError(f"{where} has feed_forward_proj {activation!r}; one of {', '.join(_ACTIVATIONS)} is read")
        try:
            return T5Config(
                **settings,
                mlp_activations=_ACTIVATIONS[activation],
                # Not scaled means a head of its own, even if that equals the embedding: transformers 5 writes
                # `tie_word_embeddings: true` for every T5.
                tied_head=scales_logits(raw),
                bias_per_layer=kind == "umt5",
            )
        except UserError as error:
            raise UserError(f"{where} does not describe a T5: {error}") from error

    def config_to_json(self, config: T5Config, dtype: str) -> dict[str, Any]:
        names = [name for name, activations in _ACTIVATIONS.items() if activations == config.mlp_activations]
        if not names:
            raise UserError(f"mlp_activations {config.mlp_activations} have no name in a Hugging Face T5 config")
        return {
            "architectures": [self.usage(config)],
            "model_type": "umt5" if config.bias_per_layer else "t5",
            "is_encoder_decoder": config.num_decoder_layers > 0,
            **{theirs: getattr(config, ours) for ours, (theirs, _) in _FIELDS.items()},
            "feed_forward_proj": names[0],
            "tie_word_embeddings": config.tied_head,
            "initializer_factor": 1.0,
            # transformers (5.23 at least) makes its cache as deep as the encoder, and fails in a deeper decoder.
            "use_cache": config.num_decoder_layers <= config.num_encoder_layers,
            "torch_dtype": dtype,
        }

    def tensor_of(self, parameter: Parameter) -> Tensor:
        # The embedding is [vocab, embed] on both sides, and vectors have no orientation.
        transposed = parameter.path[-1] in ("kernel", "rel_embedding")
        shape = parameter.shape[::-1] if transposed else parameter.shape
        return Tensor(_name(parameter), shape, transposed)

    def elsewhere(self, names: frozenset[str], raw: Mapping[str, Any], where: str) -> dict[str, str]:
        """Embedding and head, where they are under another name than their own."""
        embedding = next((name for name in (EMBEDDING, *EMBEDDING_COPIES.values()) if name in names), None)
        if embedding is None:
            raise UserError(f"{where} lacks the tensor {EMBEDDING}")
        if HEAD in names:
            return {EMBEDDING: embedding}
        if not scales_logits(raw) and raw.get("tie_word_embeddings") is False:
            return {EMBEDDING: embedding}  # a head that is not there is missed, if the model has one
        return {EMBEDDING: embedding, HEAD: embedding}

    def copies(self, config: T5Config) -> dict[str, tuple[str, str]]:
        stacks = [stack for stack in ("encoder", "decoder") if config.depth(stack)]
        copies = {EMBEDDING_COPIES[stack]: (EMBEDDING, "a T5 has one embedding") for stack in stacks}
        if config.tied_head and config.num_decoder_layers:
            advice = "set tie_word_embeddings to false there if the head is the model's own"
            copies[HEAD] = (EMBEDDING, f"config.json says that the head is tied: {advice}")
        return copies

    def usage(self, config: T5Config) -> str:
        kind = "UMT5" if config.bias_per_layer else "T5"
        return f"{kind}ForConditionalGeneration" if config.num_decoder_layers else f"{kind}EncoderModel"


def _numbers(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {name: value for name, value in raw.items() if value is not None or name not in _NULL_IS_DEFAULT}
    found = {"num_decoder_layers": raw.get("num_layers")} | found  # old folders have one depth for both
    missing = [theirs for theirs, default in _FIELDS.values() if default is None and theirs not in found]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    numbers = {}
    for ours, (theirs, default) in _FIELDS.items():
        value, real = found.get(theirs, default), isinstance(default, float)
        if isinstance(value, bool) or not isinstance(value, int | float if real else int):
            expected = "number" if real else "whole number"
            raise UserError(f"{where} has {theirs} {json.dumps(value)}; a {expected} is expected")
        numbers[ours] = float(value) if real else value
    return numbers


def scales_logits(raw: Mapping[str, Any]) -> bool:
    """Whether transformers multiplies the decoder's output by d_model ** -0.5 before the head.

    That is what `tie_word_embeddings` has always meant for T5 and umT5; transformers 5 writes it under a name of its
    own. For mT5 it meant the same until transformers 5, which never scales there and writes
    `tie_word_embeddings: true` for all.
    """
    if raw["model_type"] == "mt5":
        version = str(raw.get("transformers_version") or "").partition(".")[0]  # none in the oldest folders
        never_scales = version.isdecimal() and int(version) >= 5
        return bool(raw.get("tie_word_embeddings", False)) and not never_scales
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))


def _name(parameter: Parameter) -> str:
    stack, module, *rest = parameter.path
    if stack == "token_embedder":
        return EMBEDDING
    if module == "logits_dense":
        return HEAD
    if "relpos_bias" in parameter.path:  # of the whole stack with the first layer
        return f"{stack}.block.{parameter.layer or 0}.layer.0.SelfAttention.relative_attention_bias.weight"
    if module == f"{stack}_norm":
        return f"{stack}.final_layer_norm.weight"
    within, *projection, _ = rest  # "layers", then for instance mlp, wi_0, kernel or pre_mlp_layer_norm, scale
    parts = [_MODULES[stack, within], *(_PROJECTIONS.get(name, name) for name in projection), "weight"]
    return f"{stack}.block.{parameter.layer}.layer.{'.'.join(parts)}"
