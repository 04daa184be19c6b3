"""What an exported folder tells of the run that made it, and what an export refuses."""

import json
import pathlib

import numpy as np
import pytest

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.models import BUNDLED_FOLDER, open_model
from endistill_jax.data.vocabulary import BUNDLED
from endistill_jax.jobs import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory, distilled) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("exported") / "student"
    export(model=str(distilled), folder=str(folder))
    return folder


def test_the_model_card_has_teacher_objective_data_steps_and_metrics(exported, distilled, teacher):
    card = (exported / "README.md").read_text()
    results = json.loads((distilled / "results.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n") and "- distillation\n" in card
    assert f"distilled, task-agnostically, from `{teacher}`" in card
    assert "encoder_self/vv 0.333, decoder_self/qq 0.333" in card and "cross/qk 0.5, cross/vv 0.5, logits 1 |" in card
    assert "| steps | 4 of 4 |" in card and "`jobs_tests_v1`" in card
    assert f"| loss on non-sentinel tokens, nats a token | {results[1]['token_loss']:.4g} |" in card
    assert open_model(teacher).fingerprint in card


@pytest.mark.parametrize("format", ["t5x", "t5x_scanned"])
def test_a_run_is_exported_for_t5x_at_its_step_and_read_back(distilled, tmp_path, format):
    export(model=str(distilled), folder=str(tmp_path), format=format)
    assert (tmp_path / "checkpoint_4").is_dir()
    back = open_model(str(tmp_path))
    assert (back.fingerprint, back.step) == (open_model(str(distilled)).fingerprint, 4)


def test_dropout_is_what_the_model_was_trained_with_or_what_is_asked_for(tmp_path, teacher):
    export(model=teacher, folder=str(tmp_path / "asked"), dropout_rate=0.1)
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["dropout_rate"] == 0.1
    export(model=str(tmp_path / "asked"), folder=str(tmp_path / "kept"))
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dropout_rate"] == 0.1


def test_without_a_vocabulary_the_export_says_so(distilled, tmp_path, capsys):
    export(model=str(distilled), folder=str(tmp_path / "folder"))
    assert "the folder has no tokenizer" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_anything_is_written(refused, distilled, tmp_path):
    arguments = {"model": str(distilled), "folder": str(tmp_path / "out"), "leaves": "folder"}
    refused(export, "format is 'onnx'; choose one of huggingface, t5x", **arguments | {"format": "onnx"})
    refused(export, "dtype is 'int8'; choose one of float32, bfloat16", **arguments | {"dtype": "int8"})
    refused(export, "was trained with another vocabulary", **arguments | {"vocabulary_file": str(BUNDLED)})
    refused(export, "no model at", **arguments | {"model": str(tmp_path / "nowhere")})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("irreplaceable")
    refused(export, "taken is not empty", **arguments | {"folder": str(taken)})


def test_every_format_gives_the_same_parameters(tmp_path):
    export(model="bundled", folder=str(tmp_path / "huggingface"))
    export(model="bundled", folder=str(tmp_path / "t5x"), format="t5x")
    with (
        huggingface.open_folder(tmp_path / "huggingface") as first,
        t5x.open_checkpoint(str(tmp_path / "t5x")) as second,
    ):
        assert first.config.architecture() == second.config.architecture()
    assert open_model(str(tmp_path / "t5x")).fingerprint == open_model(str(BUNDLED_FOLDER)).fingerprint
    params = open_model(str(tmp_path / "huggingface")).params
    assert np.isfinite(params["decoder"]["decoder_norm"]["scale"]).all()
