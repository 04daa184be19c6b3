"""Exact round trips, what a written folder holds, and that nothing half written is left."""

import dataclasses
import json
import resource
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.huggingface import writing
from endistill_jax.checkpoints.tokenizer import VocabularyFile
from endistill_jax.core.errors import UserError


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",), ("gelu_exact",), ("silu", "linear")])
def test_round_trip_is_exact(tmp_path, make_params, config, tied, activations, assert_same):
    config = dataclasses.replace(config, tied_head=tied, mlp_activations=activations, dropout_rate=0.25)
    params = make_params(config)
    huggingface.save(tmp_path / "model", params, config)
    restored, restored_config = huggingface.load(tmp_path / "model")
    assert restored_config == config
    assert_same(restored, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_round_trip_is_exact_and_half_the_size(tmp_path, params, config, dtype, assert_same):
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    huggingface.save(tmp_path / "narrow", narrow, config, dtype=dtype)
    restored, _ = huggingface.load(tmp_path / "narrow", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {np.dtype(jnp.dtype(dtype))}
    assert_same(restored, narrow)
    widened, _ = huggingface.load(tmp_path / "narrow")
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {np.dtype(np.float32)}
    assert_same(widened, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), narrow))
    tensors = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(jnp.dtype(dtype))}


def test_type_that_transformers_does_not_load_is_refused(tmp_path, params, config):
    for dtype in ("int8", "float64"):
        with pytest.raises(UserError, match=f"dtype is {dtype}; choose one of float32, bfloat16, float16"):
            huggingface.save(tmp_path / "model", params, config, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_folder_on_a_bucket_is_refused(tmp_path, monkeypatch, params, config):
    monkeypatch.chdir(tmp_path)  # where a local folder called "gs:" would appear
    with pytest.raises(UserError, match="gs://bucket/model is not local; .*gcloud storage cp"):
        huggingface.save("gs://bucket/model", params, config)
    assert list(tmp_path.iterdir()) == []


def test_several_files_hold_the_same_as_one(tmp_path, params, config, assert_same):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert_same(huggingface.load(tmp_path / "model")[0], params)


@pytest.mark.parametrize("tied", [False, True])
def test_export_writes_every_name_of_the_embedding_and_says_whether_the_head_is_tied(
    tmp_path, make_params, config, tied
):
    config = dataclasses.replace(config, tied_head=tied)
    params = make_params(config)
    huggingface.save(tmp_path / "model", params, config)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    embedding = params["token_embedder"]["embedding"]
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        np.testing.assert_array_equal(tensors[name], embedding)
    head = embedding if tied else params["decoder"]["logits_dense"]["kernel"].T
    np.testing.assert_array_equal(tensors["lm_head.weight"], head)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is tied
    assert (raw["num_layers"], raw["num_decoder_layers"], raw["d_kv"], raw["d_ff"]) == (2, 3, 4, 20)
    assert (raw["pad_token_id"], raw["eos_token_id"], raw["decoder_start_token_id"]) == (0, 1, 0)


def test_every_layer_of_umt5_has_a_position_bias(tmp_path, make_params, config):
    config = dataclasses.replace(config, bias_per_layer=True)
    huggingface.save(tmp_path / "model", make_params(config), config)
    biases = [name for name in load_file(tmp_path / "model" / "model.safetensors") if "relative" in name]
    assert sorted(biases) == sorted(
        f"{stack}.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"
        for stack, depth in (("encoder", 2), ("decoder", 3))
        for layer in range(depth)
    )
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("umt5", ["UMT5ForConditionalGeneration"])


@pytest.mark.parametrize("bias_per_layer", [False, True])
def test_encoder_alone_has_no_tensor_and_no_file_of_a_decoder(tmp_path, make_params, config, bias_per_layer):
    config = dataclasses.replace(config, num_decoder_layers=0, bias_per_layer=bias_per_layer)
    huggingface.save(tmp_path / "model", make_params(config), config)
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"shared", "encoder"}
    assert not (tmp_path / "model" / "generation_config.json").exists()
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["architectures"] == ["UMT5EncoderModel" if bias_per_layer else "T5EncoderModel"]
    assert huggingface.load(tmp_path / "model")[1] == config


def test_token_ids_are_written_and_read(tmp_path, make_params, config):
    config = dataclasses.replace(config, pad_id=1, eos_id=2, decoder_start_id=3)
    huggingface.save(tmp_path / "model", make_params(config), config)
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / "model" / name).read_text())
        assert (raw["pad_token_id"], raw["eos_token_id"], raw["decoder_start_token_id"]) == (1, 2, 3)
    assert huggingface.load(tmp_path / "model")[1] == config


def test_each_stack_has_one_position_bias(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config)
    biases = [name for name in load_file(tmp_path / "model" / "model.safetensors") if "relative" in name]
    assert sorted(biases) == [
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("decoder", "encoder")
    ]


def test_generation_does_not_use_the_cache_where_transformers_makes_it_too_shallow(tmp_path, make_params, config):
    for depth, expected in ((3, False), (2, True)):
        deep = dataclasses.replace(config, num_decoder_layers=depth)
        huggingface.save(tmp_path / str(depth), make_params(deep), deep)
        generation = json.loads((tmp_path / str(depth) / "generation_config.json").read_text())
        assert generation == {
            "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "use_cache": expected
        }  # fmt: skip


def test_embedding_copies_can_be_left_out(tmp_path, params, config, assert_same):
    huggingface.save(tmp_path / "model", params, config, embedding_copies=False)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert "shared.weight" in tensors and "encoder.embed_tokens.weight" not in tensors
    assert_same(huggingface.load(tmp_path / "model")[0], params)


def test_model_card_becomes_the_readme(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, model_card="# A model ✓\n")
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == "# A model ✓\n"


def test_vocabulary_smaller_than_the_padded_embedding_comes_back_as_it_was(
    tmp_path, make_params, config, vocabulary_file
):
    # As in T5: the embedding has more rows than the vocabulary has ids.
    config = dataclasses.replace(config, vocab_size=160)
    given = VocabularyFile(str(vocabulary_file), 100)
    huggingface.save(tmp_path / "model", make_params(config), config, given)
    with huggingface.open_folder(tmp_path / "model") as source:
        assert source.config.vocab_size == 160
        assert source.vocabulary == VocabularyFile(str(tmp_path / "model" / "spiece.model"), 100)


def test_numbers_that_the_narrower_type_cannot_hold_are_refused(tmp_path, params, config):
    scale = params["decoder"]["decoder_norm"]["scale"].copy()
    scale[-1] = 1e6
    large = {**params, "decoder": {**params["decoder"], "decoder_norm": {"scale": scale}}}
    with pytest.raises(UserError, match="decoder/decoder_norm/scale in float16 holds NaN or infinity"):
        huggingface.save(tmp_path / "model", large, config, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    huggingface.save(tmp_path / "model", large, config, dtype="bfloat16")


def test_nothing_is_left_when_parameters_are_not_finite(tmp_path, params, config):
    broken = {**params, "token_embedder": {"embedding": params["token_embedder"]["embedding"] * np.float32(np.inf)}}
    with pytest.raises(UserError, match="token_embedder/embedding holds NaN or infinity"):
        huggingface.save(tmp_path / "model", broken, config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [5000, 40_000])
def test_nothing_is_left_when_a_file_can_grow_no_further(tmp_path, params, config, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            huggingface.save(tmp_path / "model", params, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"could not write {tmp_path / 'model'}: File too large; nothing was left there"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_nothing_is_left_when_the_disk_fills(small_disk, params, config, assert_same):
    with pytest.raises(UserError) as caught:
        huggingface.save(small_disk / "model", params, config)
    assert (
        str(caught.value) == f"could not write {small_disk / 'model'}: No space left on device; nothing was left there"
    )
    assert list(small_disk.iterdir()) == []
    huggingface.save(small_disk / "model", params, config, dtype="bfloat16", embedding_copies=False)
    narrow = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    assert_same(huggingface.load(small_disk / "model", "bfloat16")[0], narrow)


def test_failed_overwrite_leaves_the_old_folder_whole(tmp_path, folder, params, config, monkeypatch, assert_same):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "write_files", fail)
        huggingface.save(folder, params, config, overwrite=True)
    assert_same(huggingface.load(folder)[0], params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwriting_replaces_models_only_and_only_when_asked(tmp_path, folder, params, config, assert_same):
    doubled = jax.tree.map(lambda leaf: leaf * 2, params)
    with pytest.raises(UserError, match="is not empty"):
        huggingface.save(folder, doubled, config)
    huggingface.save(folder, doubled, config, overwrite=True)
    assert_same(huggingface.load(folder)[0], doubled)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="is not empty"):
        huggingface.save(other, params, config, overwrite=True)
    assert (other / "thesis.txt").exists()


def test_parameters_of_another_configuration_are_refused(tmp_path, params, config):
    for changes, words in (
        ({"num_decoder_layers": 4}, r"decoder/layers/\S+ has shape \(3, .*makes it \(4,"),
        ({"tied_head": True}, "no place for the parameter decoder/logits_dense/kernel"),
        ({"mlp_activations": ("relu",)}, r"lack \S+/layers/mlp/wi/kernel"),
        ({"mlp_activations": ("linear", "linear")}, "no name in a Hugging Face"),
    ):
        with pytest.raises(UserError, match=words):
            huggingface.save(tmp_path / "model", params, dataclasses.replace(config, **changes))
    assert list(tmp_path.iterdir()) == []
