"""Greedy decoding and beam search give what transformers recorded; torch is not needed."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from endistill_jax.checkpoints import huggingface
from endistill_jax.models.generation.generation import Decoding, make_decoder

FOLDER = pathlib.Path(__file__).parent
MODELS = FOLDER.parent / "checkpoints" / "huggingface" / "goldens"
KINDS = ("gated_untied", "gated_tied", "relu_tied", "mt5")
EOS = 1
SEARCHES = {
    "greedy": {"strategy": "greedy"},
    "beam_4_penalty_0.6": {"strategy": "beam", "beams": 4, "length_penalty": 0.6},
    "beam_4_penalty_1.0": {"strategy": "beam", "beams": 4, "length_penalty": 1.0},
    "beam_4_penalty_2.0": {"strategy": "beam", "beams": 4, "length_penalty": 2.0},
    "beam_2_penalty_0.0": {"strategy": "beam", "beams": 2, "length_penalty": 0.0},
}


@pytest.fixture(scope="module")
def recorded():
    return np.load(FOLDER / "decoding_goldens.npz")


@pytest.fixture(scope="module", params=KINDS)
def model(request, recorded, tmp_path_factory):
    """A kind, its parameters and settings: those of the goldens of whole passes, with the head changed as recorded."""
    data = np.load(MODELS / f"{request.param}.npz")
    tensors = {key[7:]: data[key].astype(np.float32) for key in data.files if key.startswith("tensor/")}
    tied = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    for name in ("lm_head.weight", *(tied if request.param.endswith("_tied") else ())):
        if name in tensors:  # each a copy of its own
            tensors[name][EOS] *= recorded[f"{request.param}/end_scale"]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(str(data["config"]))
    save_file(tensors, folder / "model.safetensors")
    return request.param, *huggingface.load(folder)


def test_recorded_texts_end_early_and_late_and_differ_between_searches(recorded):
    texts = {name: np.concatenate([recorded[f"{kind}/{name}/tokens"] for kind in KINDS]) for name in SEARCHES}
    lengths = {name: (text != 0).sum(axis=1) for name, text in texts.items()}
    for name in ("greedy", "beam_2_penalty_0.0", "beam_4_penalty_0.6", "beam_4_penalty_1.0"):
        assert len(set(lengths[name])) >= 3 and (lengths[name] == texts[name].shape[1]).any(), name
    # The higher the power of the length, the longer the texts.
    low, middle, high = (lengths[f"beam_4_penalty_{penalty}"].mean() for penalty in ("0.6", "1.0", "2.0"))
    assert low < middle < high
    assert (texts["greedy"] != texts["beam_4_penalty_1.0"]).any()


@pytest.mark.parametrize("name", SEARCHES)
def test_search_gives_the_recorded_texts_and_scores(model, recorded, name):
    kind, params, config = model
    expected, scores = recorded[f"{kind}/{name}/tokens"], recorded[f"{kind}/{name}/scores"]
    decode = make_decoder(config, Decoding(max_length=expected.shape[1], eos_id=EOS, **SEARCHES[name]))
    found = decode(params, recorded[f"{kind}/inputs"])
    np.testing.assert_array_equal(found.tokens, expected)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-4)
