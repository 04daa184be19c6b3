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
# v1.1 (LM-adapted and FLAN models are of the same kind), FLAN-UL2's, v1.0, and mT5's with its large, odd vocabulary.
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
}
GENERATED = 8  # tokens
# Greedy decoding says something only if no other token is nearly as likely.
SMALLEST_MARGIN = 1e-5


def model_type(kind: str) -> str:
    """What config.json calls a kind."""
    return "mt5" if kind == "mt5" else "t5"


def model_class(kind: str) -> type[transformers.PreTrainedModel]:
    """The class that transformers has for a kind."""
    return {"t5": transformers.T5ForConditionalGeneration, "mt5": transformers.MT5ForConditionalGeneration}[
        model_type(kind)
    ]


def build_model(kind: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose head is its own unless the kind ties it, in float64, weights exact in float16."""
    cls = model_class(kind)
    model = cls(cls.config_class(**KINDS[kind])).eval().double()
    if not KINDS[kind]["tie_word_embeddings"]:
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
    inputs = rng.integers(2, KINDS[kind]["vocab_size"], (2, source)).astype(np.int32)
    targets = rng.integers(2, KINDS[kind]["vocab_size"], (2, target)).astype(np.int32)
    inputs[1, source // 2 :] = 0
    targets[1, target // 2 :] = 0
    decoder_inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {"inputs": inputs, "targets": targets, "decoder_inputs": decoder_inputs}


def run_model(model: transformers.PreTrainedModel, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a model computes.

    Returns:
        `encoded` [batch, source, d_model], `logits` [batch, target, vocab_size], and the last layer's projections
        [batch, length, inner] as `encoder_self/query` and so on for all three sites.
    """
    outputs = {}
    sites = {
        "encoder_self": model.encoder.block[-1].layer[0].SelfAttention,
        "decoder_self": model.decoder.block[-1].layer[0].SelfAttention,
        "cross": model.decoder.block[-1].layer[1].EncDecAttention,
    }
    hooks = [
        getattr(attention, name[0]).register_forward_hook(
            lambda _, __, output, key=f"{site}/{name}": outputs.update({key: output.numpy()})
        )
        for site, attention in sites.items()
        for name in ("query", "key", "value")
    ]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(batch["inputs"], dtype=torch.long),
            attention_mask=torch.tensor(batch["inputs"] != 0),
            decoder_input_ids=torch.tensor(batch["decoder_inputs"], dtype=torch.long),
        )
    for hook in hooks:
        hook.remove()
    return {"encoded": output.encoder_last_hidden_state.numpy(), "logits": output.logits.numpy(), **outputs}


def generate(model: transformers.PreTrainedModel, batch: dict[str, np.ndarray], length: int = GENERATED) -> np.ndarray:
    """Greedy decoding: [batch, length], padded after the end."""
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(batch["inputs"], dtype=torch.long),
            attention_mask=torch.tensor(batch["inputs"] != 0),
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
        unfinished = torch.tensor((tokens[:, :step] != 1).all(axis=1))
        assert (best[:, 0] - best[:, 1])[unfinished].min() > SMALLEST_MARGIN, "another seed is needed"
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def main() -> None:
    folder = pathlib.Path(__file__).parent / "goldens"
    folder.mkdir(exist_ok=True)
    for kind, settings in KINDS.items():
        model, batch = build_model(kind), build_batch(kind)
        config = {"architectures": [type(model).__name__], "model_type": model_type(kind), **settings}
        tensors = {f"tensor/{name}": value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
        outputs = {f"output/{name}": value.astype(np.float32) for name, value in run_model(model, batch).items()}
        path = folder / f"{kind}.npz"
        np.savez_compressed(
            path, config=json.dumps(config), generated=generate(model, batch), **tensors, **batch, **outputs
        )
        print(f"{path}: {path.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
