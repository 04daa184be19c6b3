"""Imported models compute what transformers recorded; torch is not needed."""

import json
import pathlib
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.fingerprint import fingerprint_params
from endistill_jax.checkpoints.interchange import parameters

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from comparison import differences, generate_ours, run_ours  # noqa: E402

GOLDENS = sorted((pathlib.Path(__file__).parent / "goldens").glob("*.npz"))


def write_golden(folder, data, dtype):
    tensors = {key[7:]: data[key].astype(dtype) for key in data.files if key.startswith("tensor/")}
    folder.mkdir()
    (folder / "config.json").write_text(str(data["config"]))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_goldens_are_of_every_kind():
    kinds = {path.stem: json.loads(str(np.load(path)["config"])) for path in GOLDENS}
    assert set(kinds) == {
        "relu_tied", "gated_untied", "gated_tied", "mt5", "madlad", "umt5", "umt5_tied", "encoder", "umt5_encoder"
    }  # fmt: skip
    for kind, raw in kinds.items():
        assert raw["model_type"] == next((name for name in ("umt5", "mt5") if kind.startswith(name)), "t5")
        assert raw["architectures"][0].endswith("EncoderModel") == kind.endswith("encoder")
        assert (raw["pad_token_id"], raw["eos_token_id"]) == ((1, 2) if kind == "madlad" else (0, 1))
    for raw in kinds.values():
        assert raw["num_layers"] != raw["num_decoder_layers"] and raw["num_heads"] * raw["d_kv"] != raw["d_model"]


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_imported_model_computes_and_generates_what_transformers_recorded(golden, tmp_path):
    data = np.load(golden)
    write_golden(tmp_path / "model", data, np.float32)
    params, config = huggingface.load(tmp_path / "model")
    raw = json.loads(str(data["config"]))
    alone = golden.stem.endswith("encoder")
    assert alone or config.tied_head == golden.stem.endswith("_tied")
    assert config.num_encoder_layers == raw["num_layers"]
    assert config.num_decoder_layers == (0 if alone else raw["num_decoder_layers"])
    assert config.bias_per_layer == golden.stem.startswith("umt5")
    assert (config.pad_id, config.eos_id, config.decoder_start_id) == (raw["pad_token_id"], raw["eos_token_id"], 0)
    recorded = {key[7:]: data[key] for key in data.files if key.startswith("output/")}
    assert max(differences(run_ours(params, config, data), recorded, data).values()) < 1e-4
    if alone:
        return
    generated = data["generated"]
    np.testing.assert_array_equal(generate_ours(params, config, data, generated.shape[1]), generated)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_tensors_come_as_they_are_stored(golden, tmp_path, dtype):
    tensors = write_golden(tmp_path / "model", np.load(golden), dtype)
    with huggingface.open_folder(tmp_path / "model") as source:
        for parameter in parameters(source.config):
            stored, transposed = (
                tensors[source.config.family.huggingface.tensor_of(parameter).name],
                parameter.path[-1] in ("kernel", "rel_embedding"),
            )
            tensor = source.read(parameter)
            assert tensor.dtype == dtype and tensor.shape == parameter.shape
            np.testing.assert_array_equal(tensor, stored.T if transposed else stored)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_import_export_import_is_exact(golden, tmp_path, dtype, assert_same):
    storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    write_golden(tmp_path / "theirs", np.load(golden), storage)
    params, config = huggingface.load(tmp_path / "theirs")
    huggingface.save(tmp_path / "ours", params, config, dtype=dtype)
    again, config_again = huggingface.load(tmp_path / "ours")
    assert config_again == config
    assert_same(again, params)
    assert fingerprint_params(again) == fingerprint_params(params)
