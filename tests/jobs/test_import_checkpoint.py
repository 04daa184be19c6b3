"""Foreign checkpoints become model directories, and leave as they came."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.models import BUNDLED_FOLDER, open_model
from endistill_jax.jobs import Teacher, distill, export, import_checkpoint
from endistill_jax.objectives import presets

BUNDLED = str(BUNDLED_FOLDER)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> pathlib.Path:
    """The bundled teacher, imported."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(source=BUNDLED, model_dir=str(folder))
    return folder


def test_an_import_is_the_same_model_with_its_configuration_and_vocabulary(imported):
    theirs, ours = open_model(BUNDLED), open_model(str(imported))
    assert ours.config == theirs.config
    assert ours.vocabulary == theirs.vocabulary is not None
    assert ours.fingerprint == theirs.fingerprint
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    told = json.loads((imported / "model.json").read_text())
    assert told == theirs.config.architecture() | {"dtype": "float32", "dropout_rate": theirs.config.dropout_rate}


def test_an_import_is_exported_as_it_came(imported, tmp_path):
    export(model=str(imported), folder=str(tmp_path / "out"), dtype="bfloat16", embedding_copies=False)
    ours, theirs = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path / "out", BUNDLED_FOLDER)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and tensor.tobytes() == ours[name].tobytes()
    assert (tmp_path / "out" / "spiece.model").read_bytes() == (BUNDLED_FOLDER / "spiece.model").read_bytes()
    assert f"Converted from `{BUNDLED}`" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_imported_in_bfloat16_has_the_fingerprint_of_what_is_there(teacher, tmp_path):
    import_checkpoint(source=teacher, model_dir=str(tmp_path / "narrow"), dtype="bfloat16")
    export(model=str(tmp_path / "narrow"), folder=str(tmp_path / "folder"))
    assert open_model(str(tmp_path / "narrow")).fingerprint == open_model(str(tmp_path / "folder")).fingerprint
    assert open_model(str(tmp_path / "narrow")).fingerprint != open_model(teacher).fingerprint


@pytest.fixture(scope="module")
def imported_teacher(tmp_path_factory, teacher) -> str:
    folder = tmp_path_factory.mktemp("imported_teacher") / "teacher"
    import_checkpoint(source=teacher, model_dir=str(folder))
    return str(folder)


def test_an_import_teaches_what_its_source_teaches(distilled, experiment, imported_teacher, tmp_path):
    by_import = dataclasses.replace(experiment, teacher=Teacher(source=imported_teacher))
    distill(model_dir=str(tmp_path / "run"), experiment=by_import)
    assert open_model(str(tmp_path / "run")).fingerprint == open_model(str(distilled)).fingerprint


def test_a_dry_run_writes_nothing_and_tells_the_configuration(teacher, tmp_path, capsys):
    import_checkpoint(source=teacher, model_dir=str(tmp_path / "run"), dry_run=True)
    assert "num_encoder_layers=2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_bad_source_or_place_is_refused_and_nothing_is_left(refused, imported, distilled, teacher, tmp_path):
    arguments = {"source": teacher, "model_dir": str(tmp_path / "run")}
    refused(import_checkpoint, "run is not empty", **arguments | {"model_dir": str(imported)})
    refused(import_checkpoint, "dtype is 'int8'; choose", **arguments | {"dtype": "int8"})
    refused(import_checkpoint, "gs://bucket/run is not local", **arguments | {"model_dir": "gs://bucket/run"})
    file = tmp_path / "file"
    file.write_text("irreplaceable")
    refused(import_checkpoint, "file is a file", **arguments | {"model_dir": str(file)})
    refused(import_checkpoint, "cannot be a folder: .*file is a file", **arguments | {"model_dir": str(file / "run")})
    too_large = {"vocabulary_file": str(BUNDLED_FOLDER / "spiece.model")}
    refused(import_checkpoint, "has 8100 ids .* and the model only 384", **arguments | too_large)
    refused(import_checkpoint, "is a model directory of this system", **arguments | {"source": str(distilled)})
    refused(import_checkpoint, "no model at .*nowhere", **arguments | {"source": str(tmp_path / "nowhere")})
    refused(import_checkpoint, "no model at .*config.json", **arguments | {"source": str(tmp_path)})
    refused(import_checkpoint, "mesh", **arguments | {"mesh": (3, 1, 1)})
    poisoned = tmp_path / "poisoned"
    shutil.copytree(teacher, poisoned)
    tensors = safetensors.numpy.load_file(poisoned / "model.safetensors")
    tensors["decoder.final_layer_norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, poisoned / "model.safetensors")
    message = "poisoned/model.safetensors: decoder.final_layer_norm.weight holds NaN"
    refused(import_checkpoint, message, **arguments | {"source": str(poisoned)})


def test_a_full_disk_leaves_nothing_and_says_why(teacher, tmp_path, monkeypatch, refused):
    def full(*_args, **_kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: a long description " + "x" * 500 + ": No space left on device")

    monkeypatch.setattr(Checkpointer, "save", full)
    arguments = {"source": teacher, "model_dir": str(tmp_path / "new" / "run")}
    refused(import_checkpoint, "could not write .*run: No space left on device; nothing was left there", **arguments)
    assert not (tmp_path / "new").exists()


def test_too_little_room_is_seen_before_anything_is_read(teacher, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    refused(import_checkpoint, "has 1e-06 GB free", source=teacher, model_dir=str(tmp_path / "run"))


def test_a_step_of_a_run_is_a_model(distilled):
    directory = distilled / "checkpoints"
    first, last = (open_model(str(directory / step)) for step in ("2", "4"))
    assert (first.step, last.step) == (2, 4) and first.fingerprint != last.fingerprint
    assert open_model(str(distilled)).fingerprint == open_model(str(directory)).fingerprint == last.fingerprint


def test_an_import_is_not_a_run_to_resume(refused, experiment, imported_teacher):
    logits = dataclasses.replace(experiment, objective=presets.logits())
    refused(distill, "was made with other settings", model_dir=imported_teacher, experiment=logits)


def test_a_hub_name_is_looked_up_on_the_hub(teacher, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface, "download", lambda name: asked.append(name) or teacher)
    assert open_model("google/t5-v1_1-small").fingerprint == open_model(teacher).fingerprint
    assert asked == ["google/t5-v1_1-small"]
