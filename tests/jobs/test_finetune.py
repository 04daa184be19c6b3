"""Fine-tuning: that it learns, keeps the best, ends early, goes on exactly, and refuses what cannot work."""

import ast
import dataclasses
import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import seqio

from endistill_jax.checkpoints.manager import finished_steps, restore_params
from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.errors import Stopped, UserError
from endistill_jax.jobs import Data, Finetuning, Run, downstream, finetune
from endistill_jax.models.generation.generation import Decoding
from endistill_jax.train import finetuning as finetuning_module
from endistill_jax.train import run as execution
from endistill_jax.train.finetuning import plan_runs
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.progress import Best


@pytest.fixture(scope="session")
def finetuning(color_task) -> Finetuning:
    """Four steps on the task of `color_task`, with an evaluation and a checkpoint after every two.

    Without dropout, whose key would make the step of every seed another program to compile.
    """
    data = Data(
        task=color_task, inputs_length=16, targets_length=8, batch_size=4, pack=False, eval_batch_size=8, eval_batches=2
    )
    run = Run(steps=4, log_every=2, eval_every=2, checkpoint_every=2, tensorboard=False)
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
    return Finetuning(data=data, optimizer=optimizer, run=run, dropout_rate=0.0, scored_by="rank")


@pytest.fixture(scope="module")
def initial_states() -> list:
    """The states that the runs of `finetuned` started from."""
    return []


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, distilled, finetuning, initial_states):
    """A finished sweep over two seeds, from the last checkpoint of a distillation; its folder and its rows."""
    folder, init_state = tmp_path_factory.mktemp("finetuned"), execution.init_state

    def noted(*given, **named):
        initial_states.append(jax.device_get(init_state(*given, **named)))
        return init_state(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "init_state", noted)
        sweep = dataclasses.replace(finetuning, seeds=(0, 1))
        rows = finetune(model_dir=str(folder), model=str(distilled), finetuning=sweep)
    return folder, rows


def without_timing(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(folder / "metrics.jsonl")]


def test_best_is_the_largest_or_smallest_and_patience_counts_what_came_after():
    best = Best(metric="accuracy", mode="max", patience=2)
    seen = [best.update(step, {"accuracy": value}) for step, value in enumerate((1.0, 3.0, float("nan"), 3.0), start=1)]
    assert seen == [True, True, False, False]
    assert (best.step, best.is_over) == (2, True)
    again = Best(metric="accuracy", mode="max", patience=2)
    again.restore(json.loads(json.dumps(best.plain())))
    assert again == best and again.update(5, {"accuracy": 4.0}) and not again.is_over
    lowest = Best(metric="loss", mode="min")
    assert [lowest.update(step, {"loss": value}) for step, value in ((1, float("nan")), (2, 2.0), (3, 1.0))] == [
        False,
        True,
        True,
    ]
    last = Best()
    assert not last.update(1, {"loss": 1.0}) and not last.update(2, {"loss": 2.0}) and last.step == 2


def test_a_sweep_has_a_folder_for_each_run_and_one_row_for_its_seeds(finetuned):
    folder, (row,) = finetuned
    assert len(row["accuracy"]) == len(row["seconds"]) == 2 and row["learning_rate"] == 1e-3
    assert finished_steps(str(folder / "lr_0.001_seed_1" / "checkpoints")) == [2, 4]
    assert (folder / "results.md").read_text().startswith("## jobs_tests_color_v1, validation\n")
    first, second = (read_metrics(folder / f"lr_0.001_seed_{seed}" / "metrics.jsonl")[0] for seed in (0, 1))
    assert first["loss"] != second["loss"], "another seed is another order"


def test_training_begins_with_the_parameters_of_the_model(finetuned, distilled, initial_states):
    params, _ = restore_params(str(distilled / "checkpoints"))
    for state in initial_states:
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert len(initial_states) == 2
    tuned, model = open_model(str(finetuned[0] / "lr_0.001_seed_0")), open_model(str(distilled))
    assert tuned.manifest["run"]["initial"] == model.fingerprint and tuned.vocabulary == model.vocabulary


def test_a_finished_sweep_is_told_again_without_training(finetuned, distilled, finetuning, monkeypatch):
    folder, rows = finetuned
    monkeypatch.setattr(finetuning_module, "train", None)
    again = dataclasses.replace(finetuning, seeds=(0, 1))
    assert finetune(model_dir=str(folder), model=str(distilled), finetuning=again) == rows
    other = dataclasses.replace(again, dropout_rate=0.2)
    with pytest.raises(UserError, match=r"model\.dropout_rate is 0\.0 there and 0\.2 here"):
        finetune(model_dir=str(folder), model=str(distilled), finetuning=other)


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, finetuned, distilled, finetuning, monkeypatch):
    class StopsAtOnce:
        number = 15

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    arguments = {"model_dir": str(tmp_path), "model": str(distilled), "finetuning": finetuning}
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr("endistill_jax.train.run.StopSignal", StopsAtOnce)
        finetune(**arguments)
    assert finished_steps(str(tmp_path / "checkpoints")) == [2]
    (row,) = finetune(**arguments)
    whole = finetuned[0] / "lr_0.001_seed_0"
    wanted, got = (restore_params(str(each / "checkpoints"))[0] for each in (whole, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, wanted, got)
    assert without_timing(tmp_path) == without_timing(whole)
    assert row["accuracy"] == finetuned[1][0]["accuracy"][0]


def test_a_run_ends_when_patience_does_and_keeps_its_best_checkpoint(tmp_path, distilled, finetuning, monkeypatch):
    values = iter((10.0, 30.0, 20.0, 25.0, 99.0))

    class Report:
        def __init__(self):
            self.value = next(values)

        def scalars(self, prefix=""):
            return {f"{prefix}accuracy": self.value}

        def summary(self):
            return ""

    monkeypatch.setattr("endistill_jax.evaluation.task_metrics.TaskMetrics.evaluate", lambda *_: Report())
    run = Run(
        steps=10,
        log_every=1,
        eval_every=1,
        checkpoint_every=10,
        keep_last=1,
        keep_best="accuracy",
        best_mode="max",
        patience=2,
        tensorboard=False,
    )
    arguments = {
        "model_dir": str(tmp_path),
        "model": str(distilled),
        "finetuning": dataclasses.replace(finetuning, run=run),
    }
    (row,) = finetune(**arguments)
    assert (row["accuracy"], row["best_step"]) == (30.0, 2.0)
    assert finished_steps(str(tmp_path / "checkpoints")) == [2, 4], "the best, and the one after which it ended"
    assert finetune(**arguments) == [row], "it is finished, though it has not made all its steps"


def with_changes(finetuning: Finetuning, changed: dict) -> Finetuning:
    """The settings with others under names such as "scored_by" and "data.eval_split"."""
    for name, value in changed.items():
        part, _, field = name.rpartition(".")
        value = dataclasses.replace(getattr(finetuning, part), **{field: value}) if part else value
        finetuning = dataclasses.replace(finetuning, **{part or field: value})
    return finetuning


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"scored_by": "generation"}, r'evaluation\.scored_by is "rank" there and "generation" here'),
        ({"decoding": Decoding(max_length=4)}, r"evaluation\.decoding\.max_length is 8 there and 4 here"),
        ({"data.eval_split": "train"}, r'evaluation\.eval_split is "validation" there and "train" here'),
        ({"data.eval_batches": 1}, r"evaluation\.eval_examples is 16 there and 8 here"),
        ({"run.keep_best": "accuracy", "run.patience": 5}, r'evaluation\.keep_best is null there and "accuracy" here'),
    ],
)
def test_figures_of_another_evaluation_are_not_told_as_if_they_were_of_this_one(
    refused, finetuned, distilled, finetuning, changed, match
):
    again = with_changes(dataclasses.replace(finetuning, seeds=(0, 1)), changed)
    refused(finetune, match, model_dir=str(finetuned[0]), model=str(distilled), finetuning=again)


def test_the_same_examples_in_other_batches_are_the_same_evaluation(finetuned, distilled, finetuning):
    folder, rows = finetuned
    changed = {"seeds": (0, 1), "data.eval_batch_size": 16, "data.eval_batches": 1, "decoding": Decoding(max_length=8)}
    again = with_changes(finetuning, changed | {"run.best_mode": "max"})
    assert finetune(model_dir=str(folder), model=str(distilled), finetuning=again) == rows


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"scored_by": "votes"}, "scored_by is 'votes'; choose one of generation, rank, both"),
        ({"data.targets_length": 3}, "longest label of jobs_tests_color_v1 has 6 tokens .* make it at least 6"),
        ({"data.eval_split": "test"}, r"has no split 'test' to evaluate; it has train, validation"),
        ({"run.keep_best": "f1"}, "Run.keep_best is 'f1', which no task has; there is accuracy"),
        ({"seeds": (1, 1)}, "has a value twice"),
        ({"learning_rates": 1e-3}, r"Finetuning\.learning_rates is 0\.001; give a tuple of numbers above 0"),
        ({"run.mesh": 4}, r"Run\.mesh is 4; give a tuple of the sizes of its three axes"),
        ({"decoding": Decoding(max_length=8, strategy="beam", beams=300)}, "beams is 300"),
        ({"data.eval_batch_size": 0}, "eval_batch_size is 0; it must be a whole number of at least 1"),
        ({"run.patience": 3}, "Run.patience waits for a better keep_best"),
    ],
)
def test_what_cannot_work_is_refused_at_once(refused, tmp_path, distilled, finetuning, changed, match):
    def job(model_dir):
        finetune(model_dir=model_dir, model=str(distilled), finetuning=with_changes(finetuning, changed))

    refused(job, match, model_dir=str(tmp_path / "run"))


def test_tasks_without_metrics_splits_or_examples_and_other_vocabularies_are_refused(
    refused, tmp_path, distilled, finetuning, data, color_source
):
    arguments = {"model_dir": str(tmp_path / "run"), "model": str(distilled), "finetuning": finetuning}

    def on(task):
        return arguments | {
            "finetuning": dataclasses.replace(finetuning, data=dataclasses.replace(finetuning.data, task=task))
        }

    refused(finetune, "has no metrics to evaluate; choose a task with metric_fns", **on(data.task))
    untrainable = color_source("jobs_tests_test_color_v1", splits=("test", "validation"))
    refused(finetune, "_test_color_v1 has no split 'train'; it has test, validation", **on(untrainable))
    refused(finetune, "has no example in split 'validation'", **on(color_source("jobs_tests_no_color_v1", examples=0)))
    other = color_source("jobs_tests_other_color_v1", vocabulary=seqio.ByteVocabulary(extra_ids=50))
    refused(finetune, "the model .* was trained with another vocabulary", **on(other))


@pytest.mark.parametrize("file", ["docs/downstream.md", "gin/runs"])
def test_the_evaluation_in_the_documents_reads_what_the_fine_tuning_there_writes(file, finetuning, student):
    root = pathlib.Path(__file__).parents[2]
    texts = [path.read_text() for path in ([root / file] if file.endswith(".md") else sorted((root / file).iterdir()))]
    flags = {}
    for job in ("finetune", "evaluate"):
        command = r"endistill_jax.main (--gin_file=gin/runs/" + job + r"\.gin (?:.*\\\n)*.*)"
        words = shlex.split(re.sub(r"\\\n#?", " ", re.search(command, "\n".join(texts))[1]))
        flags[job] = dict(word.removeprefix("--gin.").split("=", 1) for word in words)
    ways = {name: ast.literal_eval(flags["finetune"][name.upper()]) for name in ("learning_rates", "seeds")}
    runs = plan_runs(flags["finetune"]["MODEL_DIR"], student, dataclasses.replace(finetuning, **ways))
    folder, _, step = flags["evaluate"]["MODEL"].rpartition("/checkpoints/")
    assert folder in [run.model_dir for run in runs] and int(step) % 1000 == 0, "EVAL_EVERY"
    assert flags["evaluate"]["TASK"] == flags["finetune"]["TASK"]


@pytest.mark.slow
def test_models_and_tasks_are_compared_in_one_table(tmp_path, distilled, finetuning, student):
    tasks = {"color": finetuning, "again": dataclasses.replace(finetuning, scored_by="generation")}
    rows = downstream(model_dir=str(tmp_path), models={"distilled": str(distilled), "untrained": student}, tasks=tasks)
    assert [row["model"] for row in rows] == ["distilled", "untrained"]
    assert all({"color/accuracy", "again/accuracy"} <= row.keys() for row in rows)
    assert finished_steps(str(tmp_path / "untrained" / "again" / "checkpoints")) == [2, 4]


def test_a_comparison_names_the_model_that_is_not_there(refused, tmp_path, finetuning):
    gone = {"gone": str(tmp_path / "nowhere")}
    arguments = {"model_dir": str(tmp_path / "run"), "models": gone, "tasks": {"color": finetuning}}
    refused(downstream, "model 'gone': no model at .*nowhere", **arguments)
    refused(downstream, "downstream.models is empty", **arguments | {"models": {}})
    refused(downstream, "a name becomes a folder", **arguments | {"tasks": {"a/b": finetuning}})
    rates = {"color": dataclasses.replace(finetuning, learning_rates=(1e-3, 1e-2))}
    refused(downstream, "task color has several learning_rates; set Run.keep_best", **arguments | {"tasks": rates})


@pytest.mark.slow
def test_a_small_model_learns_a_simple_task(tmp_path, finetuning, make_model):
    learning = dataclasses.replace(
        finetuning,
        data=dataclasses.replace(finetuning.data, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
        run=dataclasses.replace(finetuning.run, steps=200, log_every=50, eval_every=200, checkpoint_every=200),
        scored_by="both",
    )
    (row,) = finetune(model_dir=str(tmp_path), model=make_model(width=32), finetuning=learning)
    assert row["jobs_tests_color_ranked_v1/accuracy"] > 95
    assert row["jobs_tests_color_v1/accuracy"] > 95
