"""Imported models compute what T5X's networks recorded, and checkpoints that T5X wrote are read; T5X is not needed."""

import pathlib
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

from endistill_jax.checkpoints import t5x
from endistill_jax.checkpoints.interchange import parameters

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from comparison import differences, run_ours  # noqa: E402

GOLDENS = pathlib.Path(__file__).parent / "goldens"
KINDS = ("mt5", "scanned", "v1_0", "v1_1")
# Name of the archive, kind of model.
STORED = (("native", "v1_1"), ("native_scanned", "scanned"), ("orbax", "v1_0"), ("orbax_scanned_first", "v1_0"))


def test_goldens_are_of_every_kind(golden):
    assert tuple(sorted(path.stem for path in GOLDENS.glob("*.npz"))) == KINDS
    for kind in KINDS:
        config = golden(kind).config
        assert config.num_encoder_layers != config.num_decoder_layers and config.inner_dim != config.d_model
    assert golden("v1_0").config.tied_head and golden("v1_0").config.mlp_activations == ("relu",)


@pytest.mark.parametrize("batch", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_imported_model_computes_what_t5x_recorded(kind, batch, golden, write, read, tmp_path):
    recorded = golden(kind)
    params, config = read(write(tmp_path / "checkpoint_7", recorded.flat))
    assert config == recorded.config
    arrays = recorded.part(batch)
    assert ("encoder_segments" in arrays) == (batch == "packed")
    theirs = recorded.part(f"{batch}/output")
    assert max(differences(run_ours(params, config, arrays), theirs, arrays).values()) < 1e-5


@pytest.mark.parametrize(("name", "kind"), STORED)
def test_checkpoints_that_t5x_wrote_are_read_bit_for_bit(name, kind, golden, read, stored, assert_same):
    params, config = read(stored(name))
    assert_same(params, golden(kind).params)
    assert config.architecture() == golden(kind).config.architecture()


@pytest.mark.parametrize(("name", "index"), [("native", "checkpoint"), ("orbax", "state/_METADATA")])
def test_path_may_be_the_model_directory_the_step_or_the_file(name, index, stored, read, assert_same):
    folder = stored(name)
    expected, _ = read(folder)
    shutil.copytree(folder / "checkpoint_7", folder / "checkpoint_10")
    shutil.rmtree(folder / "checkpoint_7")
    for path in (folder, folder / "checkpoint_10", folder / "checkpoint_10" / index):
        assert t5x.is_checkpoint(str(path))
        assert t5x.open_checkpoint(str(path)).where == str(folder / "checkpoint_10")
        assert_same(read(path)[0], expected)


def test_latest_step_is_taken_by_number(stored):
    folder = stored("native")
    for step in (9, 10):
        shutil.copytree(folder / "checkpoint_7", folder / f"checkpoint_{step}")
    (folder / "checkpoint_11.tmp-123").mkdir()
    assert t5x.open_checkpoint(str(folder)).where.endswith("checkpoint_10")


def test_optimizer_is_never_read(stored, read, golden, assert_same):
    folder = stored("native")
    states = list((folder / "checkpoint_7").glob("state.*"))
    assert len(states) > 20
    for state in states:
        shutil.rmtree(state)
    assert_same(read(folder)[0], golden("v1_1").params)


def test_scanned_array_is_read_once_not_once_a_layer(stored, monkeypatch):
    with t5x.open_checkpoint(str(stored("native_scanned"))) as source:
        reads = []
        for name, array in source._arrays.items():
            logged = lambda index, array=array, name=name: reads.append(name) or array.read(index)  # noqa: E731
            monkeypatch.setitem(source._arrays, name, type(array)(**{**vars(array), "read": logged}))
        for parameter in parameters(source.config):
            source.read(parameter)
    assert sorted(reads) == sorted(source._arrays)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(("name", "kind"), STORED)
def test_import_export_import_is_exact(name, kind, scanned, dtype, stored, read, assert_same, tmp_path):
    params, config = read(stored(name), dtype)
    t5x.save(str(tmp_path / "ours"), params, config, step=7, dtype=dtype, scanned=scanned)
    again, config_again = read(tmp_path / "ours", dtype)
    assert config_again == config
    assert_same(again, params)
    assert {array.dtype for array in t5x.open_checkpoint(str(tmp_path / "ours"))._arrays.values()} == {np.dtype(dtype)}
