"""Records goldens/*.npz: tiny random T5 models of transformers and what they compute, for tests without torch.

Run it from the repository's root, with torch and transformers installed, when a kind of model is added:

    python tests/checkpoints/huggingface/record_goldens.py

The models are evaluated in float64, so that the goldens hold no rounding of their own; weights are exact in float16.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

# Two heads of four make an inner width of 8 in a model of width 12.
SIZES = {
    "vocab_size": 32,
    "d_model": 12,
    "d_kv": 4,
    "num_heads": 2,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# v1.1 (LM-adapted and FLAN models are of the same kind), FLAN-UL2's, v1.0, mT5's with its large, odd vocabulary,
# MADLAD-400's with its token ids, umT5's with a position bias in every layer, and encoders alone.
KINDS = {
    "gated_untied": {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated_tied": {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True},
    "relu_tied": {**SIZES, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "mt5": {
        **SIZES,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "vocab_size": 83,
        "num_layers": 1,
        "num_decoder_layers": 3,
    },
    "madlad": {
        **SIZES,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
    "umt5": {
        **SIZES,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_layers": 3,
        "num_decoder_layers": 2,
    },
    "umt5_tied": {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True},
    "encoder": {**SIZES, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "umt5_encoder": {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3},
}
GENERATED = 8  # tokens
# Greedy decoding says something only if no other token is nearly as likely.
SMALLEST_MARGIN = 1e-5


def model_type(kind: str) -> str:
    """What config.json calls a kind."""
    return next((name for name in ("umt5", "mt5") if kind.startswith(name)), "t5")


def model_class(kind: str) -> type[transformers.PreTrainedModel]:
    """The class that transformers has for a kind."""
    role = "EncoderModel" if is_encoder(kind) else "ForConditionalGeneration"
    return getattr(transformers, f"{model_type(kind).upper()}{role}")


def is_encoder(kind: str) -> bool:
    """Whether a kind is an encoder alone."""
    return kind.endswith("encoder")


def build_model(kind: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose head is its own unless the kind ties it, in float64, weights exact in float16."""
    cls = model_class(kind)
    model = cls(cls.config_class(**KINDS[kind])).eval().double()
    if not KINDS[kind]["tie_word_embeddings"] and not is_encoder(kind):
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = values * 0.4 if parameter.ndim > 1 else 1.0 + 0.2 * values
            parameter.copy_(values.half().double())
    return model


def build_batch(kind: str, seed: int = 0, source: int = 20, target: int = 9) -> dict[str, np.ndarray]:
    """Random tokens, the second row padded, sources long enough to reach the last distance bucket."""
    rng = np.random.default_rng(seed)
    pad, end = KINDS[kind]["pad_token_id"], KINDS[kind]["eos_token_id"]
    inputs = rng.integers(end + 1, KINDS[kind]["vocab_size"], (2, source)).astype(np.int32)
    targets = rng.integers(end + 1, KINDS[kind]["vocab_size"], (2, target)).astype(np.int32)
    if pad:  # the token 0 is one like others
        inputs[:, 1] = targets[:, 2] = 0
    inputs[1, source // 2 :] = pad
    targets[1, target // 2 :] = pad
    start = KINDS[kind]["decoder_start_token_id"]
    decoder_inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    segments = {"encoder_segments": inputs != pad, "decoder_segments": targets != pad} if pad else {}
    segments = {name: real.astype(np.int32) for name, real in segments.items()}
    return {"inputs": inputs, "targets": targets, "decoder_inputs": decoder_inputs, **segments}


def run_model(model: transformers.PreTrainedModel, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a model computes.

    Returns:
        `encoded` [batch, source, d_model], `logits` [batch, target, vocab_size], and the last layer's projections
        [batch, length, inner] as `encoder_self/query` and so on for all three sites; of an encoder alone, what it has.
    """
    outputs = {}
    has_decoder = hasattr(model, "decoder")
    sites = {"encoder_self": model.encoder.block[-1].layer[0].SelfAttention}
    if has_decoder:
        sites["decoder_self"] = model.decoder.block[-1].layer[0].SelfAttention
        sites["cross"] = model.decoder.block[-1].layer[1].EncDecAttention
    hooks = [
        getattr(attention, name[0]).register_forward_hook(
            lambda _, __, output, key=f"{site}/{name}": outputs.update({key: output.numpy()})
        )
        for site, attention in sites.items()
        for name in ("query", "key", "value")
    ]
    decoder_inputs = {"decoder_input_ids": torch.tensor(batch["decoder_inputs"], dtype=torch.long)}
    with torch.no_grad():
        output = model(**_inputs(model, batch), **(decoder_inputs if has_decoder else {}))
    for hook in hooks:
        hook.remove()
    if not has_decoder:
        return {"encoded": output.last_hidden_state.numpy(), **outputs}
    return {"encoded": output.encoder_last_hidden_state.numpy(), "logits": output.logits.numpy(), **outputs}


def _inputs(model: transformers.PreTrainedModel, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    real = torch.tensor(batch["inputs"] != model.config.pad_token_id)
    return {"input_ids": torch.tensor(batch["inputs"], dtype=torch.long), "attention_mask": real}


def generate(model: transformers.PreTrainedModel, batch: dict[str, np.ndarray], length: int = GENERATED) -> np.ndarray:
    """Greedy decoding: [batch, length], padded after the end."""
    with torch.no_grad():
        output = model.generate(
            **_inputs(model, batch),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            use_cache=False,  # transformers 5.23 makes it as deep as the encoder
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[:, 1:].numpy().astype(np.int32)  # without the start token
    for step, logits in enumerate(output.logits):
        best = logits.topk(2).values
        unfinished = torch.tensor((tokens[:, :step] != model.config.eos_token_id).all(axis=1))
        assert (best[:, 0] - best[:, 1])[unfinished].min() > SMALLEST_MARGIN, "another seed is needed"
    missing = ((0, 0), (0, length - tokens.shape[1]))
    return np.pad(tokens, missing, constant_values=model.config.pad_token_id)


def main() -> None:
    folder = pathlib.Path(__file__).parent / "goldens"
    folder.mkdir(exist_ok=True)
    for kind, settings in KINDS.items():
        model, batch = build_model(kind), build_batch(kind)
        config = {"architectures": [type(model).__name__], "model_type": model_type(kind), **settings}
        tensors = {f"tensor/{name}": value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
        outputs = {f"output/{name}": value.astype(np.float32) for name, value in run_model(model, batch).items()}
        path = folder / f"{kind}.npz"
        generated = {} if is_encoder(kind) else {"generated": generate(model, batch)}
        np.savez_compressed(path, config=json.dumps(config), **generated, **tensors, **batch, **outputs)
        print(f"{path}: {path.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
