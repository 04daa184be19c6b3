"""Figures over several tasks, and that TensorFlow leaves the GPUs to JAX."""

import pytest
import seqio
import tensorflow as tf

from endistill_jax.data.text_pipeline import resolve_task
from endistill_jax.evaluation.task_metrics import TaskReport, TaskResult, check_task_metrics, prepare_task_metrics
from endistill_jax.jobs import Data
from endistill_jax.sharding import make_mesh
from endistill_jax.tasks.text_to_text import counted_as


def report(**metrics_of_tasks):
    resolve_task("glue")  # registers its tasks
    settings = {"records": [], "values": [], "row_numbers": None}
    results = (
        TaskResult(task=task, counted_as=counted_as(task.replace("_ranked", "")), metrics=metrics, **settings)
        for task, metrics in metrics_of_tasks.items()
    )
    return TaskReport(results=tuple(results))


def test_the_mean_is_glues_score():
    """CoLA 40, MRPC (80 + 60) / 2 = 70, MNLI (90 + 80) / 2 = 85, AX without figures: 195 / 3."""
    glue = report(
        glue_cola_v1={"matthews_corrcoef": 40.0},
        glue_mrpc_v1={"f1": 80.0, "accuracy": 60.0},
        glue_mnli_matched_v1={"accuracy": 90.0},
        glue_mnli_mismatched_v1={"accuracy": 80.0},
        glue_ax_v1={},
    )
    assert glue.scalars()["mean"] == pytest.approx(65.0)
    assert glue.scalars("held_out/")["held_out/glue_mnli_matched_v1/accuracy"] == 90.0


def test_a_task_that_is_scored_in_two_ways_counts_once():
    """Color (20 + 60) / 2 = 40, text 10: 50 / 2."""
    both = report(
        color_v1={"accuracy": 20.0}, color_ranked_v1={"accuracy": 60.0}, text_v1={"rouge1": 12.0, "rouge2": 8.0}
    )
    assert both.scalars()["mean"] == pytest.approx(25.0)


def test_gpus_are_hidden_from_tensorflow_before_examples_are_read(monkeypatch, color_source):
    """Afterwards TensorFlow would refuse it, where there are any."""
    hidden = []
    task = color_source("jobs_tests_hidden_color_v1")
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: hidden.append((devices, kind)))
    read = seqio.FunctionDataSource.get_dataset

    def reads(self, *arguments, **settings):
        assert hidden and set(map(repr, hidden)) == {"([], 'GPU')"}
        return read(self, *arguments, **settings)

    monkeypatch.setattr(seqio.FunctionDataSource, "get_dataset", reads)
    data = Data(task=task, inputs_length=16, targets_length=8)
    check_task_metrics(data, "rank")
    assert prepare_task_metrics(data, make_mesh(1, 1, 1), scored_by="rank").evaluators
