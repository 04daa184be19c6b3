"""Runs whose folder is on a bucket, here a fake one: written, resumed, found, and read by other jobs."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.manager import finished_steps, restore_params
from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.errors import UserError
from endistill_jax.data.vocabulary import BUNDLED
from endistill_jax.jobs import Teacher, distill, evaluate, export, import_checkpoint
from endistill_jax.objectives import presets
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.metrics import read_metrics


@pytest.fixture(autouse=True)
def no_folder_called_gs(tmp_path, monkeypatch):
    """A path of a bucket that is taken for a local one makes a folder "gs:" in the current folder."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("gs:*"))


def without_timing(path) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "timing"} for record in read_metrics(path)]


def copy_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """As one copies to a bucket, which has no empty folders."""
    for file in source.rglob("*"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / file.relative_to(source))


def test_a_run_on_a_bucket_is_that_of_a_local_folder_and_resumes(bucket, distilled, experiment, capsys):
    folder = f"{bucket.url}/runs/student"
    distill(model_dir=folder, experiment=experiment)
    names = {each.name for each in distilled.iterdir()}
    assert {each.name for each in (bucket.folder / "runs/student").iterdir()} == names
    assert_is_the_run(folder, distilled)

    last = bucket.folder / "runs/student/checkpoints/4"  # as if it had been killed while it saved
    (last / "commit_success.txt").unlink()
    (last / "_CHECKPOINT_METADATA").write_text("{}")
    assert finished_steps(f"{folder}/checkpoints") == [2]
    capsys.readouterr()
    distill(model_dir=folder, experiment=experiment)
    assert "resumed from step 2" in capsys.readouterr().err
    assert_is_the_run(folder, distilled)


def assert_is_the_run(folder: str, local: pathlib.Path) -> None:
    """The same checkpoints and metrics, bit for bit."""
    assert finished_steps(f"{folder}/checkpoints") == finished_steps(f"{local}/checkpoints") == [2, 4]
    wanted, got = restore_params(f"{local}/checkpoints", 4)[0], restore_params(f"{folder}/checkpoints", 4)[0]
    jax.tree.map(np.testing.assert_array_equal, wanted, got)
    assert without_timing(f"{folder}/metrics.jsonl") == without_timing(local / "metrics.jsonl")


def test_a_run_copied_to_a_bucket_is_read_and_recognized_there(bucket, distilled, experiment):
    folder = f"{bucket.url}/copied"
    copy_files(distilled, bucket.folder / "copied")
    assert open_model(folder).fingerprint == open_model(str(distilled)).fingerprint
    distill(model_dir=folder, experiment=experiment)
    assert finished_steps(f"{folder}/checkpoints") == [2, 4]


def test_a_run_on_a_bucket_teaches_and_is_exported(bucket, corpus, make_model, pretraining, tmp_path):
    task = text_files_task("bucket_tests_v1", str(corpus), str(BUNDLED), held_out=0.1)
    large = dataclasses.replace(
        pretraining,
        student=make_model(width=16, layers=1, vocab_size=8192),
        data=dataclasses.replace(pretraining.data, task=task, eval_batches=1),
        run=dataclasses.replace(pretraining.run, steps=1),
    )
    first, second = f"{bucket.url}/first", f"{bucket.url}/second"
    distill(model_dir=first, experiment=large)
    found = open_model(first)
    assert (found.step, found.vocabulary_file.path) == (1, f"{first}/tokenizer/spiece.model")
    assert found.fingerprint == open_model(f"{first}/checkpoints/1").fingerprint
    small = dataclasses.replace(
        large,
        student=make_model(width=8, layers=1, vocab_size=8192),
        teacher=Teacher(source=first),
        objective=presets.union(relation_heads=4),
    )
    distill(model_dir=second, experiment=small)
    export(model=second, folder=str(tmp_path / "exported"))
    assert open_model(str(tmp_path / "exported")).fingerprint == open_model(second).fingerprint
    assert open_model(str(tmp_path / "exported")).vocabulary == open_model(second).vocabulary
    assert (tmp_path / "exported/spiece.model").read_bytes() == BUNDLED.read_bytes()


def test_predictions_and_tables_go_to_a_bucket(bucket, distilled, color_task, data):
    data = dataclasses.replace(data, task=color_task)
    rows = evaluate(model_dir=f"{bucket.url}/found", model=str(distilled), data=data, tensorboard=False)
    found = {str(each.relative_to(bucket.folder / "found")) for each in (bucket.folder / "found").rglob("*.*")}
    assert rows and found >= {"results.md", "results.json", "metrics.jsonl", f"predictions/{color_task.name}.jsonl"}


@pytest.mark.parametrize("format", ["t5x", "t5x_scanned"])
def test_a_t5x_checkpoint_is_imported_from_a_bucket(bucket, distilled, tmp_path, format):
    export(model=str(distilled), folder=str(bucket.folder / "models/student"), format=format)
    import_checkpoint(source=f"{bucket.url}/models/student", model_dir=str(tmp_path / "imported"))
    assert open_model(str(tmp_path / "imported")).fingerprint == open_model(str(distilled)).fingerprint


def test_an_imported_model_that_is_copied_to_a_bucket_is_read_there(bucket, teacher, tmp_path):
    import_checkpoint(source=teacher, model_dir=str(tmp_path / "imported"))
    copy_files(tmp_path / "imported", bucket.folder / "imported")
    assert open_model(f"{bucket.url}/imported").fingerprint == open_model(teacher).fingerprint


def test_what_is_read_or_written_locally_alone_says_so(bucket, teacher, distilled, tmp_path):
    huggingface.save(str(bucket.folder / "hf"), jax.device_get(open_model(teacher).load()), open_model(teacher).config)
    with pytest.raises(UserError, match="gs://.*/hf is a Hugging Face folder on a bucket.*gcloud storage cp"):
        open_model(f"{bucket.url}/hf")
    with pytest.raises(UserError, match="gs://.*/nothing is no T5X checkpoint"):
        open_model(f"{bucket.url}/nothing")
    with pytest.raises(UserError, match="gs://.*/exported is not local; .*gcloud storage cp"):
        export(model=str(distilled), folder=f"{bucket.url}/exported")
    assert t5x.is_checkpoint(f"{bucket.url}/nothing")
