"""The jobs that train: what they leave behind, what they refuse, and that they say why."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.interchange import VocabularyFile
from endistill_jax.checkpoints.models import open_model
from endistill_jax.checkpoints.reading import finished_steps, restore_params
from endistill_jax.core.errors import UserError
from endistill_jax.jobs import demo, distill, export, pretrain, train_vocabulary
from endistill_jax.models.family import abstract_params, count_params, init_params
from endistill_jax.objectives import InterpolatedTargets, Path
from endistill_jax.reports.table import format_count
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.training import Training


def test_a_distillation_leaves_checkpoints_metrics_and_a_table(distilled, teacher):
    assert finished_steps(str(distilled / "checkpoints")) == [2, 4]
    lines = read_metrics(distilled / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    terms = {"encoder_self/qq", "decoder_self/vv", "cross/qk", "logits", "loss", "teacher_cross_entropy"}
    assert terms <= lines[0].keys() and "held_out/piece_loss" in lines[-1]
    rows = json.loads((distilled / "results.json").read_text())
    assert [row["model"] for row in rows] == [f"teacher ({teacher})", "student", "unigram", "bigram"]
    assert (distilled / "results.md").read_text().count("\n") == 8


def test_hosts_compare_what_the_same_names_mean_to_each_of_them(monkeypatch, corpus, student, teacher, path, settings):
    told = []
    monkeypatch.setattr("endistill_jax.train.training.agree", lambda topic, facts: told.append(facts))
    training = Training(model_dir="none", config=student, path=path, teacher=open_model(teacher), **settings)
    training.check()
    other = text_files_task("jobs_tests_v3", str(corpus), "bytes", held_out=0.1, extra_ids=50)
    data = dataclasses.replace(settings["data"], task=other)
    dataclasses.replace(training, data=data, path=Path(lm_weight=1.0), teacher=None).check()
    assert told[0]["vocabulary"] != told[1]["vocabulary"]
    assert told[0]["teacher"]["d_model"] == 32 and told[1]["teacher"] is None


def test_the_teacher_is_not_in_the_checkpoint(distilled, student, teacher):
    params, facts = restore_params(str(distilled / "checkpoints"))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, init_params(student, jax.random.key(0)))
    assert facts["run"]["teacher"] == open_model(teacher).fingerprint


def test_a_finished_run_is_evaluated_and_not_trained_again(distilled, teacher, student, path, settings):
    before = restore_params(str(distilled / "checkpoints"))[0]
    lines = (distilled / "metrics.jsonl").read_text()
    result = distill(model_dir=str(distilled), teacher=teacher, student=student, path=path, **settings)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(result.params))
    assert (distilled / "metrics.jsonl").read_text() == lines


def test_what_changed_since_the_checkpoint_is_named(
    refused, distilled, teacher, student, path, settings, corpus, make_model, tmp_path
):
    arguments = {"model_dir": str(distilled), "teacher": teacher, "student": student, "path": path, **settings}
    deeper = dataclasses.replace(student, num_decoder_layers=3)
    refused(distill, r"model\.num_decoder_layers is 2 there and 3 here", **arguments | {"student": deeper})
    refused(distill, r"path\.logits_weight", **arguments | {"path": dataclasses.replace(path, logits_weight=0.5)})
    renamed = text_files_task("jobs_tests_v2", str(corpus), "bytes", held_out=0.1)
    other_data = dataclasses.replace(settings["data"], task=renamed)
    refused(distill, "task is .*jobs_tests_v1.* there", **arguments | {"data": other_data})
    refused(distill, 'teacher_dtype is "bfloat16" there and "float32" here', **arguments | {"teacher_dtype": "float32"})
    other = str(tmp_path / "teacher")
    config = make_model(width=32)
    huggingface.save(other, jax.device_get(init_params(config, jax.random.key(2))), config)
    refused(distill, "teacher is .* there", **arguments | {"teacher": other})


def test_a_run_is_judged_in_one_way_to_its_end(refused, distilled, teacher, student, path, settings):
    arguments = {"model_dir": str(distilled), "teacher": teacher, "student": student, "path": path, **settings}

    def judged_otherwise(match, part, **changed):
        refused(distill, match, **arguments | {part: dataclasses.replace(settings[part], **changed)})

    judged_otherwise(r"evaluation\.eval_examples is 8 there and 12 here", "data", eval_batches=3)
    judged_otherwise(r'evaluation\.eval_split is "validation" there and "train" here', "data", eval_split="train")
    judged_otherwise(r'evaluation\.keep_best is null there and "piece_loss" here', "run", keep_best="piece_loss")


def test_settings_that_do_not_fit_are_refused_before_anything_is_created(
    refused, tmp_path, teacher, student, path, settings, make_model
):
    arguments = {"model_dir": str(tmp_path / "run"), "teacher": teacher, "student": student, "path": path, **settings}
    heads = dataclasses.replace(path, cross=dataclasses.replace(path.cross, relation_heads=3))
    refused(distill, "relation_heads is 3.*choose one of 1, 2, 4, 8, 16", **arguments | {"path": heads})
    refused(distill, "no model at", **arguments | {"teacher": str(tmp_path / "nowhere")})
    small = dataclasses.replace(student, vocab_size=128)
    refused(distill, "vocab_size", **arguments | {"student": small, "path": dataclasses.replace(path, logits_weight=0)})
    short = dataclasses.replace(settings["data"], targets_length=4)
    refused(distill, "targets of 4 tokens are too short.*need", **arguments | {"data": short})
    late = dataclasses.replace(path, interpolated_targets=InterpolatedTargets(steps=settings["run"].steps + 1))
    refused(distill, "InterpolatedTargets.steps is .* at most that", **arguments | {"path": late})
    misspelt = dataclasses.replace(settings["run"], keep_best="piece_los")
    refused(distill, "keep_best is 'piece_los', which is no .* piece_loss, ", **arguments | {"run": misspelt})
    uneven = dataclasses.replace(settings["run"], micro_batches=3)
    refused(distill, "batch_size is 4; it must be a multiple of 3", **arguments | {"run": uneven})
    unknown = dataclasses.replace(settings["data"], task="jobs_tests_v7")
    refused(
        distill, "no task or mixture named 'jobs_tests_v7'; there is .*jobs_tests_v1", **arguments | {"data": unknown}
    )


def test_a_teacher_of_another_vocabulary_of_the_same_size_is_refused(
    refused, tmp_path, student, path, settings, make_model
):
    from endistill_jax.data.vocabulary import BUNDLED, EXTRA_IDS

    folder = str(tmp_path / "teacher")
    config = make_model(width=32, vocab_size=8192)
    vocabulary = VocabularyFile(str(BUNDLED), EXTRA_IDS)
    huggingface.save(folder, jax.device_get(init_params(config, jax.random.key(1))), config, vocabulary)
    student = dataclasses.replace(student, vocab_size=8192)
    arguments = {"model_dir": str(tmp_path / "run"), "teacher": folder, "student": student, "path": path, **settings}
    refused(distill, "trained with another vocabulary", **arguments)


def test_a_dry_run_tells_sizes_and_creates_nothing(tmp_path, teacher, student, path, settings, capsys):
    arguments = {"model_dir": str(tmp_path / "run"), "teacher": teacher, "student": student, "path": path, **settings}
    assert distill(**arguments, dry_run=True) is None
    told = capsys.readouterr().out
    assert "token_embedder/embedding [384, 16]" in told
    assert f"student: {format_count(count_params(abstract_params(student)))} parameters" in told
    assert not (tmp_path / "run").exists()


def test_both_students_of_the_demo_start_alike_and_see_the_same_tokens(tmp_path, teacher, student, path, settings):
    rows = demo(model_dir=str(tmp_path), teacher=teacher, student=student, path=path, seeds=(0, 1), **settings)
    told = {row["model"]: row for row in rows}
    distilled, scratch = told["student, distilled"], told["student, scratch"]
    assert distilled["train_tokens"] == scratch["train_tokens"] > 0
    assert len(distilled["piece_loss"]) == len(scratch["piece_loss"]) == 2
    first = {arm: read_metrics(tmp_path / f"{arm}_seed_1" / "metrics.jsonl")[0] for arm in ("distilled", "scratch")}
    # The loss of the first step is that of the initial parameters on the first batch.
    assert first["distilled"]["cross_entropy"] == pytest.approx(first["scratch"]["cross_entropy"], rel=1e-6)


def test_a_run_can_teach_and_be_exported(tmp_path, distilled, student, settings):
    folder = tmp_path / "folder"
    export(model=str(distilled), folder=str(folder))
    params, config = huggingface.load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, params, restore_params(str(distilled / "checkpoints"))[0])
    assert config.architecture() == student.architecture()
    logits = Path(logits_weight=1.0)
    result = distill(model_dir=str(tmp_path / "run"), teacher=str(distilled), student=student, path=logits, **settings)
    assert np.isfinite(result.report.piece_loss)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path, student, settings):
    optimizer = dataclasses.replace(settings["optimizer"], learning_rate=1e30, clip_norm=None)
    with pytest.raises(UserError, match="loss became .* lower the learning rate"):
        pretrain(model_dir=str(tmp_path), model=student, **settings | {"optimizer": optimizer})


def test_a_vocabulary_is_trained_from_a_source_and_never_overwritten(tmp_path, data):
    from endistill_jax.data.vocabulary import load_vocabulary

    file = tmp_path / "spiece.model"
    train_vocabulary(source=data.task.source, path=str(file), size=300)
    vocabulary = load_vocabulary(str(file))
    assert vocabulary.vocab_size == 400
    text = "The import statement finds a module"
    assert vocabulary.decode(vocabulary.encode(text)) == text
    with pytest.raises(UserError, match="exists already"):
        train_vocabulary(source=data.task.source, path=str(file), size=300)
