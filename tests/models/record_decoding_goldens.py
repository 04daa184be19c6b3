"""Records decoding_goldens.npz: what `generate` of transformers makes of tiny random models, for tests without torch.

Run it from the repository's root, with torch and transformers installed:

    python tests/model/record_decoding_goldens.py

The models are those of tests/checkpoints/huggingface/record_goldens.py, which also are in its goldens, with the head's
row of the end replaced by one that makes the end likely enough to come at unequal lengths. They run in float64; a
recorded search says something only if no choice in it is nearly a tie, which is seen by repeating it in float32.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "checkpoints" / "huggingface"))

from record_goldens import KINDS, build_model  # noqa: E402

PATH = pathlib.Path(__file__).parent / "decoding_goldens.npz"
EOS, LENGTH, ROWS, SOURCE = 1, 12, 6, 20
# name -> settings of `generate`
SEARCHES = {
    "greedy": {"num_beams": 1},
    "beam_4_penalty_0.6": {"num_beams": 4, "length_penalty": 0.6},
    "beam_4_penalty_1.0": {"num_beams": 4, "length_penalty": 1.0},
    "beam_4_penalty_2.0": {"num_beams": 4, "length_penalty": 2.0},
    "beam_2_penalty_0.0": {"num_beams": 2, "length_penalty": 0.0},
}
# What the head's row of the end is multiplied by.
END_SCALE = {"gated_untied": 1.6, "gated_tied": 5.0, "relu_tied": 5.0, "mt5": 1.6}


def build_inputs(kind: str) -> np.ndarray:
    """Random tokens; every row is padded to another length."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(2, KINDS[kind]["vocab_size"], (ROWS, SOURCE)).astype(np.int32)
    lengths = SOURCE - 3 * np.arange(ROWS)
    return np.where(np.arange(SOURCE) < lengths[:, None], tokens, 0)


def generate(model: transformers.PreTrainedModel, inputs: np.ndarray, settings: dict) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [batch, LENGTH], padded after the end, and scores [batch]: of beams penalised, else log-probabilities."""
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs != 0),
            max_new_tokens=LENGTH,
            do_sample=False,
            early_stopping=False,
            use_cache=False,  # transformers 5.23 makes it as deep as the encoder
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    tokens = output.sequences[:, 1:].numpy().astype(np.int32)  # without the start token
    real = np.cumsum(tokens == EOS, axis=1) - (tokens == EOS) == 0  # beams are filled up with ends
    tokens = np.where(real, tokens, 0)
    if settings["num_beams"] > 1:
        scores = output.sequences_scores.numpy()
    else:
        steps = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True).numpy()
        scores = np.where(real, steps, 0).sum(axis=1)
    return np.pad(tokens, ((0, 0), (0, LENGTH - tokens.shape[1]))), scores.astype(np.float32)


def with_likely_end(model: transformers.PreTrainedModel, scale: float) -> transformers.PreTrainedModel:
    """The same model, its head's row of the end multiplied."""
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= scale
    return model


def main() -> None:
    arrays = {}
    for kind, scale in END_SCALE.items():
        model, inputs = with_likely_end(build_model(kind), scale), build_inputs(kind)
        arrays |= {f"{kind}/inputs": inputs, f"{kind}/end_scale": np.float32(scale)}
        for name, settings in SEARCHES.items():
            tokens, scores = generate(model.double(), inputs, settings)
            again, _ = generate(model.float(), inputs, settings)
            lengths = (tokens != 0).sum(axis=1)
            print(kind, name, "lengths", lengths, "scores", np.round(scores, 3))
            assert (tokens == again).all(), "a choice was nearly a tie; another seed is needed"
            arrays |= {f"{kind}/{name}/tokens": tokens, f"{kind}/{name}/scores": scores}
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {PATH.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
