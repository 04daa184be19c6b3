"""What is written is whole, can be read piece by piece, and is refused where T5X could not be that model."""

import dataclasses
import json
import resource

import jax
import numpy as np
import pytest
from flax import serialization

from endistill_jax.checkpoints import t5x
from endistill_jax.checkpoints.t5x import writing
from endistill_jax.core.errors import UserError


def _save(folder, params, config, **settings):
    t5x.save(str(folder), params, config, **{"step": 7, **settings})
    return folder / f"checkpoint_{settings.get('step', 7)}"


@pytest.mark.parametrize("scanned", [False, True])
def test_round_trip_of_umt5_keeps_the_bias_of_every_layer(tmp_path, config, make_params, read, assert_same, scanned):
    config = dataclasses.replace(config, bias_per_layer=True)
    params = make_params(config)
    step = _save(tmp_path / "model", params, config, scanned=scanned)
    restored, restored_config = read(tmp_path / "model")
    assert restored_config == config
    assert_same(restored, params)
    # As the published umT5 checkpoints have it: [heads, layers, buckets].
    arrays = t5x.open_checkpoint(str(tmp_path / "model"))._arrays
    table = params["decoder"]["layers"]["relpos_bias"]["rel_embedding"]
    for layer in range(3):
        name = "decoder/decoder" if scanned else f"decoder/layers_{layer}"
        stored = arrays[f"{name}/relpos_bias/rel_embedding"].read(...)
        np.testing.assert_array_equal(stored[:, layer] if scanned else stored, table[layer])
    text = (step / "model.gin").read_text()
    assert "from t5x.examples.scalable_t5 import network" in text and f"scan_layers = {scanned}" in text


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",), ("silu", "linear"), ("gelu", "gelu")])
def test_round_trip_keeps_parameters_and_configuration(
    tmp_path, config, make_params, read, assert_same, activations, tied, scanned
):
    config = dataclasses.replace(config, tied_head=tied, mlp_activations=activations, dropout_rate=0.25)
    params = make_params(config)
    _save(tmp_path / "model", params, config, scanned=scanned)
    restored, restored_config = read(tmp_path / "model")
    assert restored_config == config and not t5x.open_checkpoint(str(tmp_path / "model")).notes
    assert_same(restored, params)


def test_as_many_layers_as_the_model_is_wide_are_not_mixed_up(tmp_path, config, make_params, read, assert_same):
    config = dataclasses.replace(config, num_encoder_layers=config.d_model, num_decoder_layers=config.d_model)
    params = make_params(config)
    _save(tmp_path, params, config, scanned=True)
    assert_same(read(tmp_path)[0], params)


def test_vocabulary_as_wide_as_mt5s(tmp_path, config, make_params, read, assert_same):
    config = dataclasses.replace(config, vocab_size=250112, d_model=4, num_decoder_layers=1)
    params = make_params(config)
    _save(tmp_path, params, config)
    assert_same(read(tmp_path)[0], params)


@pytest.mark.parametrize("scanned", [False, True])
def test_large_arrays_are_written_in_pieces_of_one_layer_at_most(
    tmp_path, params, config, read, assert_same, monkeypatch, scanned
):
    monkeypatch.setattr(writing, "_PIECE_BYTES", 300)
    step = _save(tmp_path, params, config, scanned=scanned)
    headers = [json.loads(file.read_text()) for file in step.glob("target.*/.zarray")]
    assert all(4 * np.prod(header["chunks"]) <= 300 for header in headers)
    assert any(header["chunks"] != header["shape"] for header in headers)
    if scanned:
        kernel = json.loads((step / "target.encoder.encoder.mlp.wo.kernel" / ".zarray").read_text())
        assert kernel["shape"] == [20, 2, 12] and kernel["chunks"][1] == 1
    assert_same(read(tmp_path)[0], params)


def test_zeros_are_written_too(tmp_path, params, config, read, assert_same):
    zeros = jax.tree.map(np.zeros_like, params)
    _save(tmp_path, zeros, config)
    assert_same(read(tmp_path)[0], zeros)


def test_file_holds_version_step_and_no_optimizer(tmp_path, params, config):
    step = _save(tmp_path, params, config, step=1234)
    content = serialization.msgpack_restore((step / "checkpoint").read_bytes())
    assert content["version"] == 3 and content["optimizer"]["state"] == {"step": np.int32(1234)}
    described = content["optimizer"]["target"]["token_embedder"]["embedding"]
    assert described["kvstore"] == {"driver": "file", "path": "target.token_embedder.embedding"}
    assert str(tmp_path) not in str(content)


def test_other_steps_stay_and_the_same_step_is_replaced_only_when_asked(tmp_path, params, config, read, assert_same):
    _save(tmp_path, params, config, step=1)
    doubled = jax.tree.map(lambda leaf: leaf * 2, params)
    with pytest.raises(UserError, match="checkpoint_1 is not empty"):
        _save(tmp_path, doubled, config, step=1)
    assert_same(read(tmp_path)[0], params)
    _save(tmp_path, doubled, config, step=2)
    assert_same(read(tmp_path)[0], doubled)
    _save(tmp_path, doubled, config, step=1, overwrite=True)
    assert_same(read(tmp_path / "checkpoint_1")[0], doubled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1", "checkpoint_2"]


@pytest.mark.parametrize("scanned", [False, True])
def test_nothing_is_left_when_the_disk_refuses(tmp_path, params, config, scanned):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # some arrays fit, others do not
    try:
        with pytest.raises(UserError, match="could not write .*checkpoint_7: .*; nothing was left there") as caught:
            _save(tmp_path / "model", params, config, scanned=scanned)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_parameters_are_not_finite(tmp_path, params, config, read, assert_same):
    broken = {**params, "token_embedder": {"embedding": params["token_embedder"]["embedding"] * np.float32(np.inf)}}
    with pytest.raises(UserError, match="token_embedder/embedding holds NaN or infinity"):
        _save(tmp_path / "model", broken, config)
    assert list(tmp_path.iterdir()) == []
    _save(tmp_path, params, config)
    with pytest.raises(UserError, match="NaN or infinity"):
        _save(tmp_path, broken, config, overwrite=True)
    assert_same(read(tmp_path)[0], params)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_7"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_decoder_layers": 4}, r"decoder/layers/\S+ has shape \(3, .*makes it \(4,"),
        ({"tied_head": True}, "no place for the parameter decoder/logits_dense/kernel"),
        ({"relative_buckets": 16}, "relative_buckets 16; T5X's network has 32"),
        ({"relative_max_distance": 64}, "relative_max_distance 64; T5X's network has 128"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05; T5X's network has 1e-06"),
        ({"mlp_activations": ("gelu_exact", "linear")}, "gelu_exact; T5X's network knows relu"),
    ],
)
def test_models_that_t5x_cannot_be_are_refused(tmp_path, params, config, changes, words):
    with pytest.raises(UserError, match=words):
        _save(tmp_path / "model", params, dataclasses.replace(config, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "settings", "words"),
    [
        ("gs://bucket/model", {}, "gs://bucket/model is not local; .*gcloud storage cp"),
        ("{}/model", {"dtype": np.float16}, "dtype is float16"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, params, config, folder, settings, words):
    with pytest.raises(UserError, match=words):
        t5x.save(folder.format(tmp_path), params, config, **{"step": 7, **settings})
    assert list(tmp_path.iterdir()) == []
