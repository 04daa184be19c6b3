"""Everything a T5X checkpoint may be beside the usual, and every way it can be bad."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from flax import serialization, traverse_util

from endistill_jax.checkpoints import t5x
from endistill_jax.checkpoints.interchange import assemble
from endistill_jax.checkpoints.t5x import source
from endistill_jax.checkpoints.t5x.files import key_value_store, locate
from endistill_jax.checkpoints.t5x.source import read_gin
from endistill_jax.core.errors import StorageFailure, UserError


def _tensors(golden, **changes):
    return {**golden("v1_1").flat, **changes}


def _edit_msgpack(step, change):
    file = step / "checkpoint"
    content = serialization.msgpack_restore(file.read_bytes())
    change(content)
    file.write_bytes(serialization.msgpack_serialize(content))


def _refusal(path, *words):
    with pytest.raises(UserError) as caught, t5x.open_checkpoint(str(path)) as opened:
        assemble(opened, np.float32)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_bfloat16_is_kept_and_so_are_the_bits_that_version_2_wrote(golden, write, read, stored, assert_same):
    flat = {name: value.astype(ml_dtypes.bfloat16) for name, value in golden("v1_1").flat.items()}
    folder = stored("native")
    expected, _ = read(write(folder / "narrow" / "checkpoint_1", flat), ml_dtypes.bfloat16)
    assert t5x.open_checkpoint(str(folder / "narrow"))._arrays["token_embedder/embedding"].dtype == ml_dtypes.bfloat16

    def store_as_bits(content):
        content["version"] = 2
        target = content["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]
        old = step / "target.encoder.layers_0.mlp.wo.kernel"
        shutil.rmtree(old)
        bits = flat["encoder/layers_0/mlp/wo/kernel"].view(np.uint16)
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(old)}, "create": True}
        ts.open({**spec, "dtype": "uint16"}, shape=bits.shape).result().write(bits).result()
        target["wo"]["kernel"] |= {"dtype": "uint16"}

    step = folder / "checkpoint_7"
    _edit_msgpack(step, store_as_bits)
    params, _ = read(step, ml_dtypes.bfloat16)
    assert_same(params["encoder"]["layers"]["mlp"]["wo"], expected["encoder"]["layers"]["mlp"]["wo"])


@pytest.mark.parametrize(
    "store",
    [
        {"driver": "gfile", "path": "{}/"},
        {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": "{}"},
        None,  # TensorStore before 0.1.14 wrote the path beside the store
    ],
)
def test_checkpoint_written_elsewhere_is_read_where_it_lies(store, stored, golden, read, assert_same):
    folder = stored("native")

    def move(tree):
        for value in tree.values():
            if "kvstore" in value:
                path = value["kvstore"]["path"].strip("/")
                if store is None:
                    value |= {"kvstore": {"driver": "gcs", "bucket": "other"}, "path": path}
                else:
                    value["kvstore"] = {**store, "path": store["path"].format(path)}
            else:
                move(value)

    _edit_msgpack(folder / "checkpoint_7", lambda content: move(content["optimizer"]["target"]))
    assert_same(read(folder)[0], golden("v1_1").params)


def test_paths_on_google_cloud_storage_are_given_to_its_driver():
    assert key_value_store(epath.Path("gs://bucket/models/checkpoint_1/target.x")) == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "models/checkpoint_1/target.x/",
    }
    assert t5x.is_checkpoint("gs://bucket/models")


def _fail_with(monkeypatch, error):
    def refuse(path):
        raise error

    monkeypatch.setattr(source, "locate", refuse)


def test_a_bucket_that_may_not_be_read_is_one_line(monkeypatch):
    _fail_with(monkeypatch, RuntimeError("Permission denied\nwhen reading metadata"))
    _refusal("gs://bucket/models", "gs://bucket/models cannot be read (RuntimeError: Permission denied when reading")


def test_cloud_storage_that_cannot_be_reached_is_no_mistake_of_the_user(monkeypatch):
    _fail_with(monkeypatch, ValueError("UNAVAILABLE: Could not resolve hostname\nwhen reading metadata"))
    with pytest.raises(StorageFailure, match="gs://bucket/models cannot be read .*Could not resolve hostname when"):
        t5x.open_checkpoint("gs://bucket/models")


def test_layers_apart_with_their_own_equal_biases_are_read(golden, write, read, assert_same, tmp_path):
    flat = golden("v1_1").flat
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        bias = flat.pop(f"{stack}/relpos_bias/rel_embedding")
        flat |= {f"{stack}/layers_{layer}/relpos_bias/rel_embedding": bias for layer in range(depth)}
    assert_same(read(write(tmp_path / "checkpoint_1", flat))[0], golden("v1_1").params)


def test_biases_that_differ_between_layers_are_a_umt5_s(golden, read, stored):
    folder = stored("native_scanned")
    path = folder / "checkpoint_7" / "target.decoder.decoder.relpos_bias.rel_embedding"
    store = ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}).result()
    store[1, 2, 5] = 9.0  # [heads, layers, buckets]
    params, config = read(folder)
    assert config.architecture() == golden("scanned").config.architecture() | {"bias_per_layer": True}
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        expected = np.stack([golden("scanned").flat[f"{stack}/relpos_bias/rel_embedding"]] * depth)
        if stack == "decoder":
            expected[2, 1, 5] = 9.0
        np.testing.assert_array_equal(params[stack]["layers"]["relpos_bias"]["rel_embedding"], expected)
        assert "relpos_bias" not in params[stack]


def test_tensors_cut_into_pieces_by_flax_are_read(golden, write, read, assert_same, tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 256)
    assert_same(read(write(tmp_path / "checkpoint_1", golden("v1_1").flat))[0], golden("v1_1").params)


def test_files_without_the_optimizers_level_are_read(golden, read, assert_same, tmp_path):
    target = traverse_util.unflatten_dict(golden("v1_1").flat, sep="/")
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize({"target": target, "state": {}}))
    assert_same(read(tmp_path)[0], golden("v1_1").params)


def test_gin_file_says_activations_and_dropout(golden, write, tmp_path):
    folder = write(tmp_path / "checkpoint_1", golden("v1_1").flat)
    (tmp_path / "config.gin").write_text("import t5x\nnetwork.T5Config:\n  vocab_size = 5\n")
    opened = t5x.open_checkpoint(str(folder))
    assert opened.config.mlp_activations == ("gelu", "linear") and "activations" in opened.notes[0]
    (tmp_path / "config.gin").write_text(
        "DROPOUT = 0.25\nnetwork.T5Config:\n  mlp_activations = \\\n      ('silu', 'linear')  # gated\n"
        "  dropout_rate = %DROPOUT\n  logits_via_embedding = False\n"
    )
    opened = t5x.open_checkpoint(str(folder))
    assert opened.config.mlp_activations == ("silu", "linear") and opened.config.dropout_rate == 0.25
    assert not opened.notes
    (tmp_path / "config.gin").write_text("network.T5Config.mlp_activations = ('relu',)\n")
    _refusal(folder, "config.gin", "('relu',)", "2 branches")
    for value in ("None", "5"):
        (tmp_path / "config.gin").write_text(f"network.T5Config.mlp_activations = {value}\n")
        _refusal(folder, "config.gin", f"mlp_activations {value}", "2 branches")
    (tmp_path / "config.gin").write_text("network.T5Config.logits_via_embedding = True\n")
    _refusal(folder, "config.gin", "logits_via_embedding = True", "decoder/logits_dense/kernel")


def test_gin_file_is_read_only_for_the_models_settings():
    assert read_gin("other.Thing.dropout_rate = 0.5\nnetwork.T5Config.dropout_rate = @unknown()\n") == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder/layers_1/attention/key/kernel": None}, ["checkpoint lacks encoder/layers_1/attention/key/kernel"]),
        ({"encoder/layers_0/attention/query/kernel": None}, ["lacks encoder/layers_0/attention/query/kernel"]),
        ({"token_embedder/embedding": None}, ["lacks token_embedder/embedding", "every T5"]),
        ({"encoder/relpos_bias/rel_embedding": None}, ["lacks encoder/relpos_bias/rel_embedding"]),
        ({"decoder/relpos_bias/rel_embedding": None}, ["lacks decoder/relpos_bias/rel_embedding"]),
        ({"decoder/layers_4/mlp/wo/kernel": np.ones((20, 12), np.float32)}, ["lacks decoder/layers_3"]),
        ({"decoder/adapter/kernel": np.ones(3, np.float32)}, ["no place for decoder/adapter/kernel"]),
        ({"decoder/layers_2/mlp/wo/kernel": np.ones((21, 12), np.float32)}, ["mlp/wo/kernel", "(21, 12)", "(20, 12)"]),
        ({"decoder/layers_0/mlp/wo/kernel": np.ones((20, 12), np.int32)}, ["mlp/wo/kernel is stored as int32"]),
        ({"decoder/layers_0/mlp/wo/kernel": "text"}, ["decoder/layers_0/mlp/wo/kernel is a str"]),
        ({"decoder/decoder_norm/scale": np.full(12, np.nan, np.float32)}, ["decoder_norm/scale holds NaN"]),
        ({"token_embedder/embedding": np.ones(12, np.float32)}, ["token_embedder/embedding has shape (12,)"]),
        ({"encoder/relpos_bias/rel_embedding": np.ones((3, 32), np.float32)}, ["3 heads", "do not divide", "8"]),
        ({"encoder/relpos_bias/rel_embedding": np.ones((2, 6), np.float32)}, ["relative_buckets is 6"]),
    ],
)
def test_bad_content_is_one_line_naming_file_and_tensor(changes, words, golden, write, tmp_path):
    tensors = {name: value for name, value in _tensors(golden, **changes).items() if value is not None}
    step = write(tmp_path / "checkpoint_1", tensors)
    _refusal(step, str(step), *words)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_cut_msgpack_is_named(length, stored):
    file = stored("native") / "checkpoint_7" / "checkpoint"
    content = file.read_bytes()
    file.write_bytes(content[:length])
    _refusal(file.parent, str(file), "copy it again")


def test_missing_array_is_named(stored):
    folder = stored("native")
    array = folder / "checkpoint_7" / "target.decoder.layers_1.mlp.wi_0.kernel"
    shutil.rmtree(array)
    _refusal(folder, f"{array} is missing", "decoder/layers_1/mlp/wi_0/kernel")


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_lost_or_cut_piece_of_an_array_is_not_taken_for_zeros(stored, damage):
    folder = stored("native")
    piece = folder / "checkpoint_7" / "target.decoder.layers_1.mlp.wi_0.kernel" / "0.0"
    if damage == "remove":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-20])
    _refusal(folder, str(piece.parent), "decoder/layers_1/mlp/wi_0/kernel")


def test_array_of_another_shape_than_its_description_is_refused(stored):
    folder = stored("native")
    header = folder / "checkpoint_7" / "target.decoder.layers_1.mlp.wi_0.kernel" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"shape": [12, 19]}))
    _refusal(folder, "decoder/layers_1/mlp/wi_0/kernel has shape (12, 19)", "(12, 20)")


def test_lost_part_of_an_orbax_database_is_refused(stored, read, assert_same, golden):
    folder = stored("orbax") / "checkpoint_7" / "state"
    refused = 0
    for piece in sorted(folder.glob("**/d/*")):
        content = piece.read_bytes()
        piece.unlink()
        try:
            assert_same(read(folder.parent)[0], golden("v1_0").params)  # a piece that nothing refers to
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            refused += 1
        piece.write_bytes(content)
    assert refused >= 2
    (folder / "_METADATA").write_text("{")
    _refusal(folder.parent, "_METADATA is damaged")


def test_things_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"\n')
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "checkpoint").write_bytes(serialization.msgpack_serialize({"step": 1}))
    for path, words in (
        (tmp_path / "absent", "is no T5X checkpoint"),
        (tmp_path, "is no T5X checkpoint"),
        (tmp_path / "notes.txt", "is no T5X checkpoint"),
        (tmp_path / "tf", "TensorFlow"),
        (tmp_path / "flax", "names no parameters"),
    ):
        _refusal(path, str(path), words)
    assert not any(t5x.is_checkpoint(str(path)) for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "absent"))


def test_config_of_a_checkpoint_is_read_from_shapes_alone(golden, write, tmp_path):
    step = write(tmp_path / "checkpoint_1", golden("v1_0").flat)
    (tmp_path / "config.gin").unlink()
    opened = t5x.open_checkpoint(str(step))
    assert opened.config == dataclasses.replace(golden("v1_0").config, dropout_rate=0.0)
    assert locate(str(tmp_path)).step_folder.name == "checkpoint_1" and opened.vocabulary is None
