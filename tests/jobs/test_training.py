"""The jobs that train: what they leave behind, what they refuse, and that they say why."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.manager import finished_steps, restore_params
from endistill_jax.checkpoints.models import open_model
from endistill_jax.checkpoints.tokenizer import VocabularyFile
from endistill_jax.core.errors import UserError
from endistill_jax.jobs import Teacher, demo, distill, export, train_vocabulary
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.objectives import InterpolatedTargets, presets
from endistill_jax.reports.table import format_count
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.training import Training, open_training


def test_a_distillation_leaves_checkpoints_metrics_and_a_table(distilled, teacher):
    assert finished_steps(str(distilled / "checkpoints")) == [2, 4]
    lines = read_metrics(distilled / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    terms = {"encoder_self/qq", "decoder_self/vv", "cross/qk", "logits", "loss", "teacher_cross_entropy"}
    assert terms <= lines[0].keys() and "held_out/token_loss" in lines[-1]
    rows = json.loads((distilled / "results.json").read_text())
    assert [row["model"] for row in rows] == [f"teacher ({teacher})", "student", "unigram", "bigram"]
    assert (distilled / "results.md").read_text().count("\n") == 8


def changed(experiment, part=None, **settings):
    """The experiment with other settings, of itself or of one of its parts."""
    if part is not None:
        settings = {part: dataclasses.replace(getattr(experiment, part), **settings)}
    return dataclasses.replace(experiment, **settings)


def test_hosts_compare_what_the_same_names_mean_to_each_of_them(monkeypatch, corpus, experiment, pretraining):
    compared = []
    monkeypatch.setattr("endistill_jax.train.training.agree", lambda topic, facts: compared.append(facts))
    open_training("none", experiment).check()
    other = text_files_task("jobs_tests_v3", str(corpus), "bytes", held_out=0.1, extra_ids=50)
    Training(model_dir="none", experiment=changed(pretraining, "data", task=other)).check()
    assert compared[0]["vocabulary"] != compared[1]["vocabulary"]
    assert compared[0]["teacher"]["d_model"] == 32 and compared[1]["teacher"] is None


def test_the_teacher_is_not_in_the_checkpoint(distilled, student, teacher):
    params, manifest = restore_params(str(distilled / "checkpoints"))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_params(student))
    assert manifest["run"]["teacher"] == open_model(teacher).fingerprint


def test_a_finished_run_is_evaluated_and_not_trained_again(distilled, experiment):
    before = restore_params(str(distilled / "checkpoints"))[0]
    lines = (distilled / "metrics.jsonl").read_text()
    result = distill(model_dir=str(distilled), experiment=experiment)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(result.params))
    assert (distilled / "metrics.jsonl").read_text() == lines


def test_a_finished_run_is_continued_when_it_is_given_more_steps(tmp_path, distilled, experiment, capfd):
    folder = tmp_path / "run"
    shutil.copytree(distilled, folder)
    longer = changed(experiment, "run", steps=6)
    result = distill(model_dir=str(folder), experiment=longer)
    assert "continues a finished run of 4 steps to 6" in capfd.readouterr().err
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 6]
    before = [line for line in lines if "tokens" in line]
    assert before[3]["tokens"] < before[5]["tokens"] == result.tokens, "it reads on, and counts on"


def test_a_student_starts_from_any_checkpoint(tmp_path, distilled, pretraining, student, capfd):
    onwards = changed(pretraining, initial_checkpoint=str(distilled))
    distill(model_dir=str(tmp_path / "onwards"), experiment=onwards)
    assert f"starts from the parameters of {distilled}, step 4; optimizer" in capfd.readouterr().err
    distill(model_dir=str(tmp_path / "fresh"), experiment=pretraining)
    first = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("onwards", "fresh")]
    last = read_metrics(distilled / "metrics.jsonl")[3]
    assert first[0]["cross_entropy"] == pytest.approx(last["cross_entropy"], rel=0.2)
    assert first[0]["cross_entropy"] != first[1]["cross_entropy"]


def test_what_changed_since_the_checkpoint_is_named(
    refused, distilled, experiment, student, corpus, make_model, make_teacher, tmp_path
):
    def refuses(match, **settings):
        refused(distill, match, model_dir=str(distilled), experiment=changed(experiment, **settings))

    deeper = dataclasses.replace(student, num_decoder_layers=3)
    refuses(r"model\.num_decoder_layers is 1 there and 3 here", student=deeper)
    refuses(
        r"objective\.terms\.cross/qk\.relation_heads is 4 there and 8 here", objective=presets.union(relation_heads=8)
    )
    renamed = text_files_task("jobs_tests_v2", str(corpus), "bytes", held_out=0.1)
    refuses("task is .*jobs_tests_v1.* there", part="data", task=renamed)
    refuses('teacher_dtype is "bfloat16" there and "float32" here', part="teacher", dtype="float32")
    other = make_teacher(tmp_path / "teacher", make_model(width=32), seed=2)
    refuses("teacher is .* there", part="teacher", source=other)
    # How the run is judged decides which step is the best.
    refuses(r"evaluation\.eval_examples is 8 there and 12 here", part="data", eval_batches=3)
    refuses(r'evaluation\.eval_split is "validation" there and "train" here', part="data", eval_split="train")
    refuses(r'evaluation\.keep_best is null there and "token_loss" here', part="run", keep_best="token_loss")


def test_settings_that_do_not_fit_are_refused_before_anything_is_created(refused, tmp_path, experiment, student):
    def refuses(match, **settings):
        refused(distill, match, model_dir=str(tmp_path / "run"), experiment=changed(experiment, **settings))

    refuses("relation_heads is 3.*choose one of 1, 2, 4, 8, 16", objective=presets.union(relation_heads=3))
    refuses("no model at", teacher=Teacher(source=str(tmp_path / "nowhere")))
    small = dataclasses.replace(student, vocab_size=128)
    refuses("vocab_size", student=small, objective=presets.minilm(relation_heads=4))
    refuses("targets of 4 tokens are too short.*need", part="data", targets_length=4)
    late = InterpolatedTargets(steps=experiment.run.steps + 1)
    refuses("InterpolatedTargets.steps is .* at most that", objective=presets.logits(interpolated_targets=late))
    refuses("keep_best is 'token_los', which is no .* token_loss, ", part="run", keep_best="token_los")
    refuses("batch_size is 4; it must be a multiple of 3", part="run", micro_batches=3)
    refuses("no task or mixture named 'jobs_tests_v7'; there is .*jobs_tests_v1", part="data", task="jobs_tests_v7")
    refuses("there is none; give one", teacher=None)
    refuses(
        "d_model 32 instead of 64", teacher=Teacher(source=experiment.teacher.source, config=student_of(64, student))
    )


def student_of(width, student):
    depths = dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2)
    return dataclasses.replace(student, d_model=width, head_dim=16, mlp_dim=64, **depths)


def test_a_teacher_of_another_vocabulary_of_the_same_size_is_refused(
    refused, tmp_path, experiment, student, make_model, make_teacher
):
    from endistill_jax.data.vocabulary import BUNDLED, EXTRA_IDS

    vocabulary = VocabularyFile(str(BUNDLED), EXTRA_IDS)
    folder = make_teacher(tmp_path / "teacher", make_model(width=32, vocab_size=8192), vocabulary)
    larger = changed(experiment, student=dataclasses.replace(student, vocab_size=8192), teacher=Teacher(source=folder))
    refused(distill, "trained with another vocabulary", model_dir=str(tmp_path / "run"), experiment=larger)


def test_a_dry_run_prints_sizes_and_creates_nothing(tmp_path, experiment, student, capsys):
    assert distill(model_dir=str(tmp_path / "run"), experiment=experiment, dry_run=True) is None
    printed = capsys.readouterr().out
    assert "token_embedder/embedding [384, 16]" in printed
    assert f"student: {format_count(count_params(abstract_params(student)))} parameters" in printed
    assert not (tmp_path / "run").exists()


def test_both_students_of_the_demo_start_alike_and_see_the_same_tokens(tmp_path, experiment):
    rows = demo(model_dir=str(tmp_path), experiment=experiment, seeds=(0, 1))
    by_model = {row["model"]: row for row in rows}
    distilled, scratch = by_model["student, distilled"], by_model["student, scratch"]
    assert distilled["train_tokens"] == scratch["train_tokens"] > 0
    assert len(distilled["token_loss"]) == len(scratch["token_loss"]) == 2
    first = {arm: read_metrics(tmp_path / f"{arm}_seed_1" / "metrics.jsonl")[0] for arm in ("distilled", "scratch")}
    # The loss of the first step is that of the initial parameters on the first batch.
    assert first["distilled"]["cross_entropy"] == pytest.approx(first["scratch"]["cross_entropy"], rel=1e-6)


def test_a_run_can_teach_and_be_exported(tmp_path, distilled, experiment, student):
    folder = tmp_path / "folder"
    export(model=str(distilled), folder=str(folder))
    params, config = huggingface.load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, params, restore_params(str(distilled / "checkpoints"))[0])
    assert config.architecture() == student.architecture()
    taught = changed(experiment, teacher=Teacher(source=str(distilled)), objective=presets.logits())
    result = distill(model_dir=str(tmp_path / "run"), experiment=taught)
    assert np.isfinite(result.report.token_loss)


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path, pretraining):
    diverging = changed(pretraining, "optimizer", learning_rate=1e30, clip_norm=None)
    with pytest.raises(UserError, match="loss became .* lower the learning rate"):
        distill(model_dir=str(tmp_path), experiment=diverging)


def test_norms_of_the_gradient_are_logged_by_stack(distilled):
    line = read_metrics(distilled / "metrics.jsonl")[0]
    parts = [line[f"gradient_norm/{stack}"] for stack in ("encoder", "decoder", "embedding")]
    assert np.linalg.norm(parts) == pytest.approx(line["gradient_norm"], rel=1e-5) and min(parts) > 0


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


def test_an_encoder_alone_is_distilled_and_evaluated_by_its_distance_from_the_teacher(tmp_path, experiment, student):
    alone = dataclasses.replace(student, num_decoder_layers=0)
    encoder = changed(experiment, student=alone, objective=presets.encoder(relation_heads=4))
    result = distill(model_dir=str(tmp_path / "run"), experiment=encoder)
    assert "decoder" not in result.params and np.isfinite(result.report.loss)
    export(model=str(tmp_path / "run"), folder=str(tmp_path / "folder"))
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architectures"] == ["T5EncoderModel"]
