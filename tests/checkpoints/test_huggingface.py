"""Hugging Face folders: goldens recorded from transformers, exact round trips, and every way a folder can be bad."""

import dataclasses
import errno
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from endistill_jax.checkpoints import huggingface
from endistill_jax.errors import UserError
from endistill_jax.model.t5 import T5

GOLDENS = sorted((pathlib.Path(__file__).parent / "goldens").glob("*.npz"))


def _assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _write_folder(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def _edit(folder, change_tensors=None, **change_config):
    """Rewrites a folder with other tensors or config entries."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change_config}))
    if change_tensors:
        tensors = dict(load_file(folder / "model.safetensors"))
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config)
    return tmp_path / "model"


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_imported_model_computes_what_transformers_recorded(golden, tmp_path):
    data = np.load(golden)
    tensors = {key[7:]: data[key].astype(np.float32) for key in data.files if key.startswith("tensor/")}
    params, config = huggingface.load(_write_folder(tmp_path / "model", json.loads(str(data["config"])), tensors))
    assert config.tied_head == golden.stem.endswith("_tied")
    assert (config.num_encoder_layers, config.num_decoder_layers, config.dropout_rate) == (2, 1, 0.1)
    batch = {
        "encoder_input_tokens": data["inputs"],
        "decoder_input_tokens": data["decoder_inputs"],
        "decoder_target_tokens": data["targets"],
        "decoder_loss_weights": (data["targets"] != 0).astype(np.int32),
    }
    output = T5(config).apply({"params": params}, batch)
    source, target = data["inputs"] != 0, data["targets"] != 0
    np.testing.assert_allclose(np.asarray(output.encoded)[source], data["encoded"][source], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.asarray(output.logits)[target], data["logits"][target], rtol=0, atol=1e-4)


def test_goldens_cover_both_heads_and_both_mlps():
    assert [path.stem for path in GOLDENS] == ["gated_tied", "gated_untied", "relu_tied"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",), ("gelu_exact",), ("silu", "linear")])
def test_round_trip_is_exact(tmp_path, params, config, tied, activations):
    config = dataclasses.replace(config, tied_head=tied, mlp_activations=activations, dropout_rate=0.25)
    tree = jax.tree.map(lambda leaf: leaf, params)
    if tied:
        del tree["decoder"]["logits_dense"]
    if len(activations) == 1:
        for stack in ("encoder", "decoder"):
            mlp = tree[stack]["layers"]["mlp"]
            mlp["wi"] = mlp.pop("wi_0")
            del mlp["wi_1"]
    huggingface.save(tmp_path / "model", tree, config)
    restored, restored_config = huggingface.load(tmp_path / "model")
    assert restored_config == config
    _assert_same(restored, tree)


def test_bfloat16_round_trip_is_exact_and_half_the_size(tmp_path, params, config):
    narrow = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    huggingface.save(tmp_path / "narrow", narrow, config, dtype="bfloat16")
    restored, _ = huggingface.load(tmp_path / "narrow", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {np.dtype(ml_dtypes.bfloat16)}
    _assert_same(restored, narrow)
    widened, _ = huggingface.load(tmp_path / "narrow")
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {np.dtype(np.float32)}
    _assert_same(widened, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), narrow))
    tensors = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_several_files_hold_the_same_as_one(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    restored, _ = huggingface.load(tmp_path / "model")
    _assert_same(restored, params)


@pytest.mark.parametrize("tied", [False, True])
def test_export_writes_every_name_of_the_embedding_and_says_whether_the_head_is_tied(tmp_path, params, config, tied):
    tree = {**params, "decoder": {k: v for k, v in params["decoder"].items() if not (tied and k == "logits_dense")}}
    huggingface.save(tmp_path / "model", tree, dataclasses.replace(config, tied_head=tied))
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
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["decoder_start_token_id"] == 0


def test_embedding_copies_can_be_left_out(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, embedding_copies=False)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert "shared.weight" in tensors and "encoder.embed_tokens.weight" not in tensors
    _assert_same(huggingface.load(tmp_path / "model")[0], params)


def test_embedding_is_found_under_a_stack_name_alone(folder, params):
    def drop(tensors):
        del tensors["shared.weight"], tensors["encoder.embed_tokens.weight"]

    _edit(folder, drop)
    _assert_same(huggingface.load(folder)[0], params)


def test_config_of_transformers_5_does_not_turn_an_own_head_into_a_tied_one(folder, params):
    # transformers 5 writes tie_word_embeddings true whatever the model, and the scaling under another name.
    _edit(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    restored, config = huggingface.load(folder)
    assert not config.tied_head
    _assert_same(restored, params)


def test_unscaled_head_without_a_tensor_is_the_embedding(folder, params):
    _edit(folder, lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True, scale_decoder_outputs=False)
    restored, config = huggingface.load(folder)
    assert not config.tied_head
    np.testing.assert_array_equal(
        restored["decoder"]["logits_dense"]["kernel"], params["token_embedder"]["embedding"].T
    )


def test_entries_that_old_configs_lack_take_their_defaults(tmp_path, folder, config):
    raw = json.loads((folder / "config.json").read_text())
    for name in ("relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon"):
        del raw[name]
    (folder / "config.json").write_text(json.dumps(raw))
    assert huggingface.load(folder)[1] == dataclasses.replace(config, dropout_rate=0.1)


def _poison(tensors):
    tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"][0, 0] = np.nan


def _reshape(tensors):
    tensors["encoder.final_layer_norm.weight"] = np.ones(11, np.float32)


def _add(tensors):
    tensors["encoder.block.7.layer.0.layer_norm.weight"] = np.ones(12, np.float32)


def _quantise(tensors):
    tensors["encoder.final_layer_norm.weight"] = np.ones(12, np.int8)


def _split_embedding(tensors):
    tensors["decoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (_poison, {}, ["model.safetensors", "decoder.block.1.layer.2.DenseReluDense.wo.weight", "NaN"]),
        (_reshape, {}, ["model.safetensors", "encoder.final_layer_norm.weight", "(11,)", "(12,)"]),
        (_add, {}, ["model.safetensors", "encoder.block.7.layer.0.layer_norm.weight", "no place"]),
        (_quantise, {}, ["encoder.final_layer_norm.weight", "I8"]),
        (_split_embedding, {}, ["decoder.embed_tokens.weight", "differs"]),
        (lambda tensors: tensors.pop("lm_head.weight"), {}, ["lacks the tensor lm_head.weight"]),
        (
            lambda tensors: tensors.pop("encoder.block.1.layer.0.SelfAttention.k.weight"),
            {},
            ["lacks the tensor encoder.block.1.layer.0.SelfAttention.k.weight"],
        ),
        (None, {"num_layers": 3}, ["lacks the tensor encoder.block.2.layer.0"]),
        (None, {"tie_word_embeddings": True}, ["config.json", "tied", "lm_head.weight differs"]),
        (None, {"feed_forward_proj": "gated-mish"}, ["config.json", "gated-mish"]),
        (
            None,
            {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"},
            ["config.json", "BartForConditionalGeneration", "T5ForConditionalGeneration"],
        ),
        (None, {"architectures": ["T5EncoderModel"]}, ["config.json", "T5EncoderModel"]),
    ],
)
def test_bad_content_is_one_line_naming_file_and_tensor(folder, change, settings, words):
    _edit(folder, change, **settings)
    with pytest.raises(UserError) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is damaged or cut short"):
        huggingface.load(folder)


def test_missing_shard_is_named_with_a_tensor_it_holds(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing; .*index.json says it holds \S+\.weight"):
        huggingface.load(tmp_path / "model")


def test_things_that_are_no_folder_are_refused(tmp_path, folder):
    for path, words in (
        (tmp_path / "absent", "is not a folder"),
        (folder / "config.json", "is not a folder"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(UserError, match=words):
            huggingface.load(path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="neither model.safetensors nor .*pytorch_model.bin is not read"):
        huggingface.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        huggingface.load(folder)


def test_nothing_is_left_when_the_disk_fills(tmp_path, params, config, monkeypatch):
    def full(partial, *_):
        (partial / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write_tensors", full)
    with pytest.raises(UserError, match="could not write .*model: No space left on device"):
        huggingface.save(tmp_path / "model", params, config)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_parameters_are_not_finite(tmp_path, params, config):
    broken = {**params, "token_embedder": {"embedding": params["token_embedder"]["embedding"] * np.float32(np.inf)}}
    with pytest.raises(UserError, match="token_embedder/embedding holds NaN or infinity"):
        huggingface.save(tmp_path / "model", broken, config)
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_leaves_the_old_folder_whole(folder, params, config, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(huggingface, "write_tensors", fail)
        huggingface.save(folder, params, config, overwrite=True)
    _assert_same(huggingface.load(folder)[0], params)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_overwriting_replaces_models_only_and_only_when_asked(tmp_path, folder, params, config):
    doubled = jax.tree.map(lambda leaf: leaf * 2, params)
    with pytest.raises(UserError, match="is not empty"):
        huggingface.save(folder, doubled, config)
    huggingface.save(folder, doubled, config, overwrite=True)
    _assert_same(huggingface.load(folder)[0], doubled)
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
        ({"mlp_activations": ("relu",)}, "lack encoder/layers/mlp/wi/kernel"),
        ({"mlp_activations": ("linear", "linear")}, "no name in a Hugging Face"),
    ):
        with pytest.raises(UserError, match=words):
            huggingface.save(tmp_path / "model", params, dataclasses.replace(config, **changes))
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_that_cannot_go_with_the_model_is_refused(tmp_path, params, config, vocabulary_file):
    text = tmp_path / "text.model"
    text.write_text("not a model")
    for file, words in (
        (tmp_path / "absent.model", "is not there"),
        (text, "is not a SentencePiece model"),
        (vocabulary_file, r"ids \(100 of them extra\) and the model only 40"),
    ):
        with pytest.raises(UserError, match=words):
            huggingface.save(tmp_path / "model", params, config, str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["text.model"]


def test_tokenizer_files_name_the_vocabulary_and_its_special_pieces(tmp_path, params, config, vocabulary_file):
    wide = dataclasses.replace(config, vocab_size=200)
    tree = {
        **params,
        "token_embedder": {"embedding": np.ones((200, 12), np.float32)},
        "decoder": {**params["decoder"], "logits_dense": {"kernel": np.ones((12, 200), np.float32)}},
    }
    huggingface.save(tmp_path / "model", tree, wide, str(vocabulary_file), extra_ids=10)
    assert (tmp_path / "model" / "spiece.model").read_bytes() == vocabulary_file.read_bytes()
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings["eos_token"], settings["unk_token"]) == ("<pad>", "</s>", "<unk>")
    assert settings["extra_ids"] == 10 and settings["additional_special_tokens"][9] == "<extra_id_9>"
