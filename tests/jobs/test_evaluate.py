"""The evaluation job: its tables, its predictions, and GLUE's submissions."""

import dataclasses
import json

import pytest

from endistill_jax.evaluation.task_metrics import TaskResult
from endistill_jax.jobs import Data, evaluate
from endistill_jax.jobs.evaluate import submit
from endistill_jax.train.metrics import read_metrics


@pytest.fixture(scope="session")
def arguments(color_task, distilled):
    data = Data(task=color_task, inputs_length=16, targets_length=8, eval_batch_size=8)
    return {"model": str(distilled), "data": data, "tensorboard": False}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, arguments):
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, evaluate(model_dir=str(folder), scored_by="both", **arguments)


def test_every_task_has_its_metrics_in_a_table_and_its_predictions_in_a_file(evaluated):
    folder, rows = evaluated
    assert [row["task"] for row in rows] == ["jobs_tests_color_v1", "jobs_tests_color_ranked_v1"]
    assert json.loads((folder / "results.json").read_text()) == rows
    (line,) = read_metrics(folder / "metrics.jsonl")
    assert line["step"] == 4 and {"mean", "jobs_tests_color_v1/accuracy"} <= line.keys()
    for name in ("jobs_tests_color_v1", "jobs_tests_color_ranked_v1"):
        records = [json.loads(text) for text in (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()]
        assert [record["index"] for record in records] == list(range(20))
        assert {"inputs", "target", "prediction", "score"} <= records[0].keys()
        assert all(record["score"] < 0 for record in records)
    assert records[0]["prediction"] in ("red", "green", "blue")
    assert records[0]["score"] == max(records[0]["scores"].values())


def test_the_table_is_of_what_the_predictions_say(evaluated):
    folder, rows = evaluated
    text = (folder / "predictions" / "jobs_tests_color_ranked_v1.jsonl").read_text()
    right = [record["prediction"] == record["target"] for record in map(json.loads, text.splitlines())]
    assert rows[1]["value"] == pytest.approx(100 * sum(right) / 20)


def test_a_test_set_of_glue_gives_a_file_to_submit_and_others_none(tmp_path):
    result = {"metrics": {}, "records": [], "counted_as": "any"}
    submit(str(tmp_path), TaskResult(task="glue_rte_ranked_v1", values=[1, 0], row_numbers=[1, 0], **result))
    submit(str(tmp_path), TaskResult(task="jobs_tests_color_v1", values=[1], row_numbers=None, **result))
    assert [file.name for file in (tmp_path / "submission").iterdir()] == ["RTE.tsv"]
    assert (tmp_path / "submission" / "RTE.tsv").read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"


def test_of_two_scorings_of_a_test_set_that_by_rank_is_submitted(tmp_path, arguments, color_source, capsys):
    task = color_source("jobs_tests_mnli_matched_v1", splits=("test",))
    data = dataclasses.replace(arguments["data"], task=task, eval_split="test")
    evaluate(model_dir=str(tmp_path), scored_by="both", **arguments | {"data": data})
    assert capsys.readouterr().out.count("MNLI-m.tsv") == 1, "it is written once"
    ranked = (tmp_path / "predictions" / "jobs_tests_mnli_matched_ranked_v1.jsonl").read_text().splitlines()
    colors = [json.loads(line)["prediction"] for line in ranked]
    label_of = {"red": "entailment", "green": "neutral", "blue": "contradiction"}
    submitted = (tmp_path / "submission" / "MNLI-m.tsv").read_text().splitlines()[1:]
    assert submitted == [f"{index}\t{label_of[color]}" for index, color in enumerate(colors)]


def test_mistakes_are_refused_before_anything_is_created(refused, tmp_path, arguments, distilled, data):
    settings = arguments | {"model_dir": str(tmp_path / "run")}
    refused(evaluate, "is that of a training run", **settings | {"model_dir": str(distilled)})
    refused(evaluate, "no model at", **settings | {"model": str(tmp_path / "nowhere")})
    refused(evaluate, "has no metrics to evaluate", **settings | {"data": data})
    refused(evaluate, "scored_by is 'votes'", **settings | {"scored_by": "votes"})
    wrong = Data(task="jobs_tests_colour_v1")
    refused(
        evaluate, "no task or mixture named 'jobs_tests_colour_v1'; .*jobs_tests_color", **settings | {"data": wrong}
    )
