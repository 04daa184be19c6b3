"""What may stand in a folder and still be a T5, and every way a folder can be bad."""

import dataclasses
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.huggingface import weights
from endistill_jax.checkpoints.interchange import parameters
from endistill_jax.core.errors import UserError


def test_opening_reads_no_tensor(folder, config, monkeypatch):
    def fail(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(weights, "_read_rows", fail)
    with huggingface.open_folder(folder) as source:
        assert source.config == config and source.where == str(folder)
        assert source.vocabulary is None and source.step == 0 and source.notes == ()


@pytest.mark.parametrize("tied", [False, True])
def test_reading_holds_one_tensor_at_a_time(tmp_path, make_params, config, tied):
    # Large enough that nothing but tensors counts; all copies of the embedding are compared.
    config = dataclasses.replace(config, vocab_size=1 << 16, d_model=16, tied_head=tied)
    huggingface.save(tmp_path / "model", make_params(config), config)
    largest = 4 * config.vocab_size * config.d_model
    tracemalloc.start()
    try:
        with huggingface.open_folder(tmp_path / "model") as source:
            for parameter in parameters(config):
                source.read(parameter)
        assert largest < tracemalloc.get_traced_memory()[1] < 2 * largest
    finally:
        tracemalloc.stop()


def test_embedding_is_found_under_a_stack_name_alone(folder, params, edit, assert_same):
    def drop(tensors):
        del tensors["shared.weight"], tensors["encoder.embed_tokens.weight"]

    edit(folder, drop)
    assert_same(huggingface.load(folder)[0], params)


def test_equal_copies_of_other_storage_types_are_one_embedding(folder, params, edit, assert_same):
    narrow = params["token_embedder"]["embedding"].astype(ml_dtypes.bfloat16)

    def mix(tensors):
        tensors["shared.weight"] = narrow
        tensors["encoder.embed_tokens.weight"] = narrow.astype(np.float32)
        tensors["decoder.embed_tokens.weight"] = narrow.astype(np.float64)

    edit(folder, mix)
    restored, _ = huggingface.load(folder)
    np.testing.assert_array_equal(restored["token_embedder"]["embedding"], narrow.astype(np.float32))


def test_config_of_transformers_5_does_not_turn_an_own_head_into_a_tied_one(folder, params, edit, assert_same):
    # transformers 5 writes tie_word_embeddings true whatever the model, and the scaling under another name.
    edit(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    restored, config = huggingface.load(folder)
    assert not config.tied_head
    assert_same(restored, params)


def test_unscaled_head_without_a_tensor_is_the_embedding(folder, params, edit):
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True, scale_decoder_outputs=False)
    restored, config = huggingface.load(folder)
    assert not config.tied_head
    np.testing.assert_array_equal(
        restored["decoder"]["logits_dense"]["kernel"], params["token_embedder"]["embedding"].T
    )


def test_only_a_t5_whose_head_is_tied_scales_its_logits(folder, edit):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()

    edit(folder, tie)
    assert not huggingface.open_folder(folder).config.tied_head
    edit(folder, tie_word_embeddings=True)
    assert huggingface.open_folder(folder).config.tied_head
    raw = json.loads((folder / "config.json").read_text())
    del raw["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert huggingface.open_folder(folder).config.tied_head


@pytest.mark.parametrize(
    ("version", "tied", "scaled"),
    [
        ("4.57.1", True, True),
        ("4.57.1", False, False),
        ("4.57.1", None, False),
        (None, True, True),  # the oldest do not say
        ("5.0.0.dev0", True, False),  # transformers 5 says of every mT5 that it is tied, and scales none
        ("5.23.0", True, False),
    ],
)
def test_mt5_scales_its_logits_if_it_was_saved_tied_before_transformers_5(folder, edit, version, tied, scaled):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()

    edit(folder, tie, model_type="mt5", architectures=["MT5ForConditionalGeneration"])
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    if tied is None:
        del raw["tie_word_embeddings"]
    if version is not None:
        raw["transformers_version"] = version
    (folder / "config.json").write_text(json.dumps(raw))
    assert huggingface.open_folder(folder).config.tied_head == scaled


def test_entries_that_old_configs_lack_take_their_defaults(folder, config, edit):
    raw = json.loads((folder / "config.json").read_text())
    for name in ("relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "architectures"):
        del raw[name]
    (folder / "config.json").write_text(json.dumps(raw))
    assert huggingface.load(folder)[1] == dataclasses.replace(config, dropout_rate=0.1)
    for kind, name in (("t5", "T5ForConditionalGeneration"), ("mt5", "MT5ForConditionalGeneration")):
        del raw["feed_forward_proj"]
        raw |= {"model_type": kind, "architectures": [name]}
        (folder / "config.json").write_text(json.dumps(raw))
        if kind == "mt5":  # gated unless it says otherwise
            assert huggingface.load(folder)[1].mlp_activations == ("gelu", "linear")
        else:
            with pytest.raises(UserError, match=r"lacks the tensor .*DenseReluDense\.wi\.weight"):
                huggingface.open_folder(folder)
        raw["feed_forward_proj"] = "gated-gelu"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": None}, r"config.json has d_model null; a whole number is expected"),
        ({"num_layers": "2"}, r'config.json has num_layers "2"; a whole number is expected'),
        ({"d_kv": True}, r"config.json has d_kv true; a whole number"),
        ({"relative_attention_num_buckets": 32.5}, r"has relative_attention_num_buckets 32.5; a whole number"),
        ({"dropout_rate": None}, r"config.json has dropout_rate null; a number is expected"),
        ({"feed_forward_proj": ["gated-gelu"]}, r"config.json has feed_forward_proj \['gated-gelu'\]; one of relu, "),
        ({"model_type": ["t5"]}, r"model_type \['t5'\]\); only the model types t5, mt5, umt5"),
    ],
)
def test_entry_of_another_type_is_named(folder, edit, changes, words):
    edit(folder, **changes)
    with pytest.raises(UserError, match=words):
        huggingface.open_folder(folder)


@pytest.mark.parametrize("absent", [True, False])
def test_decoder_is_as_deep_as_the_encoder_unless_the_config_says_otherwise(tmp_path, make_params, config, absent):
    config = dataclasses.replace(config, num_decoder_layers=config.num_encoder_layers)
    huggingface.save(tmp_path / "model", make_params(config), config)
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    raw["num_decoder_layers"] = None
    if absent:
        del raw["num_decoder_layers"]
    path.write_text(json.dumps(raw))
    assert huggingface.load(tmp_path / "model")[1] == config


def test_unused_position_bias_of_early_exports_is_passed_over(folder, params, edit, assert_same):
    def add(tensors):
        name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[name] = np.ones((32, 2), np.float32)

    edit(folder, add)
    assert_same(huggingface.load(folder)[0], params)


def _poison(tensors):
    tensors["decoder.block.1.layer.2.DenseReluDense.wo.weight"][0, 0] = np.nan


def _poison_embedding(tensors):
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name][3, 2] = np.nan


def _reshape(tensors):
    tensors["encoder.final_layer_norm.weight"] = np.ones(11, np.float32)


def _transpose(tensors):
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def _add(tensors):
    tensors["encoder.block.7.layer.0.layer_norm.weight"] = np.ones(12, np.float32)


def _add_bias_to_layer(tensors):
    name = "decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[name] = np.ones((32, 2), np.float32)


def _quantise(tensors):
    tensors["encoder.final_layer_norm.weight"] = np.ones(12, np.int8)


def _split_embedding(tensors):
    tensors["decoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] + 1


def _drop_embedding(tensors):
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (_poison, {}, ["model.safetensors", "decoder.block.1.layer.2.DenseReluDense.wo.weight", "NaN"]),
        (_poison_embedding, {}, ["model.safetensors", "shared.weight", "NaN"]),
        (_reshape, {}, ["model.safetensors", "encoder.final_layer_norm.weight", "(11,)", "(12,)"]),
        (_transpose, {}, ["encoder.block.1.layer.1.DenseReluDense.wo.weight", "(20, 12)", "(12, 20)"]),
        (_add, {}, ["model.safetensors", "encoder.block.7.layer.0.layer_norm.weight", "no place"]),
        (_add_bias_to_layer, {}, ["decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "no place"]),
        (_quantise, {}, ["encoder.final_layer_norm.weight", "I8"]),
        (_split_embedding, {}, ["decoder.embed_tokens.weight", "differs"]),
        (_drop_embedding, {}, ["lacks the tensor shared.weight"]),
        (lambda tensors: tensors.pop("lm_head.weight"), {}, ["lacks the tensor lm_head.weight"]),
        (
            lambda tensors: tensors.pop("encoder.block.1.layer.0.SelfAttention.k.weight"),
            {},
            ["lacks the tensor encoder.block.1.layer.0.SelfAttention.k.weight"],
        ),
        (None, {"num_layers": 3}, ["lacks the tensor encoder.block.2.layer.0"]),
        (None, {"num_layers": "many"}, ["config.json", "many"]),
        (None, {"num_heads": 0}, ["config.json", "num_heads is 0"]),
        (None, {"tie_word_embeddings": True}, ["config.json", "tied", "lm_head.weight differs"]),
        (None, {"feed_forward_proj": "gated-mish"}, ["config.json", "gated-mish"]),
        (None, {"pad_token_id": 77}, ["config.json", "pad_id is 77"]),
        (None, {"eos_token_id": [1, 2]}, ["config.json", "eos_token_id [1, 2]; a whole number"]),
        (None, {"eos_token_id": 0}, ["config.json", "would look like padding"]),
        (
            None,
            {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"},
            ["config.json", "BartForConditionalGeneration", "only the model types t5, mt5, umt5"],
        ),
        (None, {"architectures": ["T5Model"]}, ["config.json", "describes T5Model", "T5EncoderModel"]),
        (None, {"architectures": ["T5EncoderModel"]}, ["no place for: decoder.block.0"]),
        (
            None,
            {"architectures": ["UMT5ForConditionalGeneration"], "model_type": "umt5"},
            ["lacks the tensor decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"],
        ),
    ],
)
def test_bad_content_is_one_line_naming_file_and_tensor(folder, edit, change, settings, words):
    edit(folder, change, **settings)
    with pytest.raises(UserError) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("cut", [100, -9])
def test_truncated_file_is_named(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="model.safetensors is damaged or cut short"):
        huggingface.open_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "spiece.model", "tokenizer.json"])
def test_git_lfs_pointer_is_called_one(folder, name):
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 3132668808\n")
    with pytest.raises(UserError, match=rf"{folder / name} is a git-lfs pointer, .*'git lfs pull'"):
        huggingface.open_folder(folder)


def test_missing_shard_is_named(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing; .*index.json names it"):
        huggingface.open_folder(tmp_path / "model")


def test_tensor_that_a_shard_lacks_is_named(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    dropped = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != dropped}, shard)
    with pytest.raises(UserError, match=f"model lacks the tensor {dropped}"):
        huggingface.open_folder(tmp_path / "model")


def test_tensor_in_two_shards_is_named_with_both(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    first, second = sorted((tmp_path / "model").glob("model-*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value}, second)
    with pytest.raises(UserError, match=rf"{second.name} and {first.name} both hold {name}"):
        huggingface.open_folder(tmp_path / "model")


def test_damaged_index_is_named(tmp_path, params, config):
    huggingface.save(tmp_path / "model", params, config, max_file_bytes=4000)
    for content in ("{", "{}", "[1]", '{"weight_map": {"shared.weight": 3}}'):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="model.safetensors.index.json is not a valid index"):
            huggingface.open_folder(tmp_path / "model")


def test_things_that_are_no_folder_are_refused(tmp_path, folder):
    for path in (tmp_path / "absent", folder / "config.json"):
        with pytest.raises(UserError, match="has no config.json"):
            huggingface.open_folder(path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights; one of model.safetensors.*, pytorch_model.bin"):
        huggingface.open_folder(folder)
    for content, words in (("{", "is not valid JSON"), ("{}", "no architecture")):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=f"config.json .*{words}|config.json {words}"):
            huggingface.open_folder(folder)
