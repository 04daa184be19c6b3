"""A Hugging Face T5 folder's config.json, to and from `T5Config`."""

import json
import pathlib
from typing import Any

from endistill_jax.errors import UserError
from endistill_jax.model.config import T5Config

# In transformers "gated-gelu" is the tanh form, and a plain "gelu" or any other gated one is the form it names.
_ACTIVATIONS = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gelu": ("gelu_exact",),
    "gelu_new": ("gelu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
}
_ARCHITECTURE = "T5ForConditionalGeneration"


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The content of config.json, once it is sure to be a T5's.

    Raises:
        UserError: if there is no such file, it is no JSON, or another architecture's.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a Hugging Face T5 folder (config.json, model.safetensors)")
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face T5 folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    found = raw.get("architectures") or [raw.get("model_type")]
    if raw.get("model_type") != "t5" or found[0] not in (_ARCHITECTURE, "T5WithLMHeadModel", "t5"):
        raise UserError(
            f"{path} describes {found[0]} (model_type {raw.get('model_type')}); only {_ARCHITECTURE} is read"
        )
    return raw


def config_from_json(raw: dict[str, Any], path: pathlib.Path, *, own_head: bool) -> T5Config:
    """Translates config.json.

    Args:
        raw: its content.
        path: of the file, for messages.
        own_head: whether the weights hold an `lm_head` that differs from the embedding. config.json does not say so
            reliably: transformers 5 writes `tie_word_embeddings: true` for every T5.

    Returns:
        The configuration. A model whose logits are not scaled has its own head here, even if it equals the embedding.

    Raises:
        UserError: for a missing or unusable entry, or a head that contradicts config.json.
    """
    missing = [name for name in _SIZES.values() if name not in raw]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    activation = raw.get("feed_forward_proj", "relu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{path} has feed_forward_proj {activation!r}; one of {', '.join(_ACTIVATIONS)} is read")
    scaled = scales_logits(raw)
    if scaled and own_head:
        raise UserError(
            f"{path} says that the head is tied, but lm_head.weight differs from shared.weight; "
            "set tie_word_embeddings to false if the head is the model's own"
        )
    return T5Config(
        **{ours: int(raw[theirs]) for ours, theirs in _SIZES.items()},
        num_decoder_layers=int(raw.get("num_decoder_layers") or raw["num_layers"]),
        mlp_activations=_ACTIVATIONS[activation],
        tied_head=scaled,
        dropout_rate=float(raw.get("dropout_rate", 0.1)),
        relative_buckets=int(raw.get("relative_attention_num_buckets", 32)),
        relative_max_distance=int(raw.get("relative_attention_max_distance", 128)),
        layer_norm_epsilon=float(raw.get("layer_norm_epsilon", 1e-6)),
    )


def scales_logits(raw: dict[str, Any]) -> bool:
    """Whether transformers multiplies the decoder's output by d_model ** -0.5 before the head.

    That is what `tie_word_embeddings` has always meant for T5; transformers 5 writes it under a name of its own.
    """
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))


def config_to_json(config: T5Config, dtype: str) -> dict[str, Any]:
    """The content of config.json for a model of ours.

    Raises:
        UserError: if transformers has no name for the activations.
    """
    names = [name for name, activations in _ACTIVATIONS.items() if activations == config.mlp_activations]
    if not names:
        raise UserError(f"mlp_activations {config.mlp_activations} have no name in a Hugging Face T5 config")
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "t5",
        "is_encoder_decoder": True,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": names[0],
        "tie_word_embeddings": config.tied_head,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "initializer_factor": 1.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "use_cache": True,
        "torch_dtype": dtype,
    }
