"""A Hugging Face T5 folder's config.json, to and from `T5Config`."""

import json
import pathlib
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.config import T5Config

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
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
}
_DEFAULTS = {
    "dropout_rate": 0.1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_ARCHITECTURE = "T5ForConditionalGeneration"
# What may stand under `architectures`; old folders leave it out.
_ARCHITECTURES = {
    "t5": (_ARCHITECTURE, "T5WithLMHeadModel", None),
    "mt5": ("MT5ForConditionalGeneration", _ARCHITECTURE, None),
}
_DEFAULT_ACTIVATION = {"t5": "relu", "mt5": "gated-gelu"}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The content of config.json, once it is sure to be a T5's or mT5's.

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
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a configuration: it holds no names with values")
    kind, names = raw.get("model_type"), raw.get("architectures") or [None]
    if not isinstance(names, list):
        raise UserError(f'{path} has architectures {json.dumps(names)}; a list such as ["{_ARCHITECTURE}"] is expected')
    found = names[0]
    if kind == "umt5":
        raise UserError(
            f"{path} describes a umT5, whose layers have a position bias each; only models with one for a whole stack "
            "(T5, mT5) are read"
        )
    if not isinstance(kind, str) or found not in _ARCHITECTURES.get(kind, ()):
        raise UserError(
            f"{path} describes {found or 'no architecture'} (model_type {kind}); only {_ARCHITECTURE} and "
            "MT5ForConditionalGeneration are read"
        )
    return raw


def config_from_json(raw: dict[str, Any], path: pathlib.Path) -> T5Config:
    """Translates config.json.

    A model whose logits are not scaled has its own head here, even if that equals the embedding: transformers 5 writes
    `tie_word_embeddings: true` for every T5.

    Args:
        raw: its content.
        path: of the file, for messages.

    Raises:
        UserError: for a missing or unusable entry.
    """
    numbers = _numbers(raw, path)
    activation = raw.get("feed_forward_proj", _DEFAULT_ACTIVATION[raw["model_type"]])
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(f"{path} has feed_forward_proj {activation!r}; one of {', '.join(_ACTIVATIONS)} is read")
    for name in ("pad_token_id", "decoder_start_token_id"):
        if raw.get(name) not in (None, 0):
            raise UserError(f"{path} has {name} {raw[name]}; only models that pad and start with token 0 are read")
    try:
        return T5Config(
            **{ours: numbers[theirs] for ours, theirs in _SIZES.items()},
            num_decoder_layers=numbers["num_decoder_layers"],
            mlp_activations=_ACTIVATIONS[activation],
            tied_head=scales_logits(raw),
            dropout_rate=float(numbers["dropout_rate"]),
            relative_buckets=numbers["relative_attention_num_buckets"],
            relative_max_distance=numbers["relative_attention_max_distance"],
            layer_norm_epsilon=float(numbers["layer_norm_epsilon"]),
        )
    except UserError as error:  # T5Config names what it cannot be
        raise UserError(f"{path} does not describe a T5: {error}") from error


def _numbers(raw: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    missing = [name for name in _SIZES.values() if name not in raw]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    numbers = {name: raw[name] for name in _SIZES.values()}
    numbers |= {name: raw.get(name, default) for name, default in _DEFAULTS.items()}
    depth = raw.get("num_decoder_layers")  # none in old folders
    numbers["num_decoder_layers"] = raw["num_layers"] if depth is None else depth
    for name, value in numbers.items():
        real = isinstance(_DEFAULTS.get(name), float)
        if isinstance(value, bool) or not isinstance(value, int | float if real else int):
            expected = "number" if real else "whole number"
            raise UserError(f"{path} has {name} {json.dumps(value)}; a {expected} is expected")
    return numbers


def scales_logits(raw: dict[str, Any]) -> bool:
    """Whether transformers multiplies the decoder's output by d_model ** -0.5 before the head.

    That is what `tie_word_embeddings` has always meant for T5; transformers 5 writes it under a name of its own. For
    mT5 it meant the same until transformers 5, which never scales there and writes `tie_word_embeddings: true` for all.
    """
    if raw["model_type"] == "mt5":
        return bool(raw.get("tie_word_embeddings", False)) and not _saved_by_transformers_5(raw)
    return bool(raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True)))


def _saved_by_transformers_5(raw: dict[str, Any]) -> bool:
    version = str(raw.get("transformers_version") or "").partition(".")[0]  # none in the oldest folders
    return version.isdecimal() and int(version) >= 5


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
        # transformers (5.23 at least) makes its cache as deep as the encoder, and fails in a deeper decoder.
        "use_cache": config.num_decoder_layers <= config.num_encoder_layers,
        "torch_dtype": dtype,
    }
