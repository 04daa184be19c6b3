"""Records goldens/*.npz: tiny random T5 models of transformers and what they compute, for tests without torch.

Run it from the repository's root, with torch and transformers installed, when a kind of model is added:

    python tests/checkpoints/record_huggingface_goldens.py

The models are evaluated in float64, so that the goldens hold no rounding of their own; weights are exact in float16.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

KINDS = {
    "gated_untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated_tied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True},
    "relu_tied": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}
# Unequal depths; two heads of four make an inner width of 8 in a model of width 12.
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


def build_model(kind: str, seed: int = 0) -> transformers.T5ForConditionalGeneration:
    """A random model whose head is its own unless the kind ties it, in float64, weights exact in float16."""
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, **KINDS[kind])).eval().double()
    if not KINDS[kind]["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = values * 0.4 if parameter.ndim > 1 else 1.0 + 0.2 * values
            parameter.copy_(values.half().double())
    return model


def build_batch(seed: int = 0, source: int = 20, target: int = 9) -> dict[str, np.ndarray]:
    """Random tokens, the second row padded, sources long enough to reach the last distance bucket."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, SIZES["vocab_size"], (2, source)).astype(np.int32)
    targets = rng.integers(2, SIZES["vocab_size"], (2, target)).astype(np.int32)
    inputs[1, source // 2 :] = 0
    targets[1, target // 2 :] = 0
    decoder_inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {"inputs": inputs, "targets": targets, "decoder_inputs": decoder_inputs}


def run_model(model: transformers.T5ForConditionalGeneration, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encoder output [batch, source, d_model] and logits [batch, target, vocab_size]."""
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(batch["inputs"], dtype=torch.long),
            attention_mask=torch.tensor(batch["inputs"] != 0),
            decoder_input_ids=torch.tensor(batch["decoder_inputs"], dtype=torch.long),
        )
    return {"encoded": output.encoder_last_hidden_state.numpy(), "logits": output.logits.numpy()}


def main() -> None:
    folder = pathlib.Path(__file__).parent / "goldens"
    folder.mkdir(exist_ok=True)
    for kind, settings in KINDS.items():
        model, batch = build_model(kind), build_batch()
        config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", **SIZES, **settings}
        tensors = {f"tensor/{name}": value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
        outputs = {name: value.astype(np.float32) for name, value in run_model(model, batch).items()}
        path = folder / f"{kind}.npz"
        np.savez_compressed(path, config=json.dumps(config), **tensors, **batch, **outputs)
        print(f"{path}: {path.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
