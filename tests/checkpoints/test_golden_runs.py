"""Golden checkpoints: what earlier versions left behind is still read, recognized as finished, and resumed exactly."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import tarfile
from typing import NamedTuple

import pytest

from endistill_jax.checkpoints.manager import finished_steps
from endistill_jax.checkpoints.manifest import renamed_metrics
from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.errors import UserError
from endistill_jax.data.pipeline import make_iterator
from endistill_jax.jobs import Data, Experiment, Run, Teacher, distill
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import (
    ForwardKL,
    HiddenDistance,
    InterpolatedTargets,
    Objective,
    Ramp,
    presets,
    relations,
)
from endistill_jax.tasks.pretraining import text_files_task
from endistill_jax.train.metrics import read_metrics
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.training import finished, open_training

GOLDENS = pathlib.Path(__file__).with_name("goldens_runs")
STUDENT = T5Config(
    vocab_size=384,
    d_model=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    scan_layers=False,
)


class Golden(NamedTuple):
    """A folder in which runs were made, by relative names, and what they ended with."""

    folder: pathlib.Path
    expected: dict
    data: Data


def unpack(name: str, folder: pathlib.Path) -> Golden:
    """Unpacks a golden, and registers its task there: tf.data's saved position has the corpus's relative name."""
    with tarfile.open(GOLDENS / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    with contextlib.chdir(folder):
        task = text_files_task(f"golden_{name}", "corpus.txt", "bytes", held_out=0.1)
    data = Data(task=task, inputs_length=8, targets_length=4, batch_size=4, eval_batch_size=4, eval_batches=2)
    return Golden(folder, json.loads((GOLDENS / f"{name}.json").read_text()), data)


@pytest.fixture(scope="module")
def unpacked_1(tmp_path_factory) -> Golden:
    return unpack("format_1", tmp_path_factory.mktemp("format_1"))


@pytest.fixture
def format_1(unpacked_1, monkeypatch) -> Golden:
    """Manifests of schema 1, recorded by the code before `Experiment`; the current folder is that of the runs."""
    monkeypatch.chdir(unpacked_1.folder)
    return unpacked_1


def distilled_1(golden: Golden) -> Experiment:
    return Experiment(
        student=STUDENT,
        teacher=Teacher(source="teacher", dtype="float32"),
        objective=presets.union(relation_heads=2),
        data=golden.data,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
        run=Run(steps=8, log_every=1, checkpoint_every=4, keep_last=2, tensorboard=False),
    )


def pretrained_1(golden: Golden) -> Experiment:
    return Experiment(
        student=STUDENT,
        objective=presets.scratch(z_loss=1e-4),
        data=golden.data,
        optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-2),
        run=Run(steps=4, log_every=1, checkpoint_every=4, keep_last=1, tensorboard=False),
    )


def assert_metrics_are(got: list[dict], wanted: list[dict]) -> None:
    """Every recorded metric, by its present name; new ones may stand beside them."""
    assert [record["step"] for record in got] == [record["step"] for record in wanted]
    for ours, theirs in zip(map(renamed_metrics, got), map(renamed_metrics, wanted), strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert ours.get("tokens") == theirs.get("tokens")


def assert_resumes(golden: Golden, experiment: Experiment) -> None:
    """The checkpoint of step 4 is what was saved, and comes to the recorded end."""
    wanted = golden.expected["distilled"]
    assert open_model("teacher").fingerprint == golden.expected["teacher"]["fingerprint"]
    assert open_model("distilled/checkpoints/4").fingerprint == wanted["fingerprints"]["4"]
    result = distill(model_dir="distilled", experiment=experiment)
    assert_metrics_are(read_metrics("distilled/metrics.jsonl"), wanted["metrics"])
    assert result.tokens == wanted["tokens"] and finished_steps("distilled/checkpoints") == [4, 8]
    assert result.report.scalars() == pytest.approx(renamed_metrics(wanted["held_out"]), rel=1e-4)


def test_a_run_of_format_1_resumes_to_the_recorded_end(format_1):
    assert_resumes(format_1, distilled_1(format_1))


def test_a_position_in_the_data_of_format_1_gives_the_recorded_batches(format_1):
    data, expected, digest = format_1.data, format_1.expected["batches"], hashlib.sha256()
    position = pathlib.Path("distilled/checkpoints/4/data/shard_0_of_1").read_bytes()
    batches = make_iterator(data.task, split="train", task_feature_lengths=data.feature_lengths, batch_size=4, seed=0)
    batches.restore({"shard_0_of_1": position})
    for batch in itertools.islice(batches, expected["number"]):
        digest.update(batch["encoder_input_tokens"].tobytes() + batch["decoder_target_tokens"].tobytes())
    assert digest.hexdigest() == expected["sha256"]


def test_a_finished_run_of_format_1_is_recognized_and_another_is_refused(format_1):
    wanted, experiment = format_1.expected["pretrained"], pretrained_1(format_1)
    found = finished(open_training("pretrained", experiment))
    assert found.tokens == wanted["tokens"] and found.best.metrics == renamed_metrics(wanted["held_out"])
    assert open_model("pretrained").fingerprint == wanted["fingerprints"]["4"]
    other = dataclasses.replace(experiment, objective=presets.scratch(z_loss=1e-3))
    with pytest.raises(UserError, match=r"objective\.terms\.lm\.z_loss is 0\.0001 there and 0\.001 here"):
        finished(open_training("pretrained", other))


@pytest.fixture(scope="module")
def unpacked_2(tmp_path_factory) -> Golden:
    return unpack("format_2", tmp_path_factory.mktemp("format_2"))


@pytest.fixture
def format_2(unpacked_2, monkeypatch) -> Golden:
    """Manifests of schema 2, a term with parameters of its own, interpolated targets with a state."""
    monkeypatch.chdir(unpacked_2.folder)
    return unpacked_2


def distilled_2(golden: Golden) -> Experiment:
    terms = (
        *relations("cross", ("qk", "vv"), relation_heads=2),
        HiddenDistance(coefficient=Ramp(start=0.5, steps=6)),
        ForwardKL(),
    )
    return Experiment(
        student=dataclasses.replace(STUDENT, d_model=4, head_dim=2, mlp_dim=8, tied_head=True),
        teacher=Teacher(source="teacher", dtype="float32"),
        objective=Objective(terms=terms, interpolated_targets=InterpolatedTargets(steps=7, adaptive_rate=0.1)),
        data=golden.data,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
        run=Run(steps=8, log_every=1, checkpoint_every=4, keep_last=2, tensorboard=False),
    )


def test_a_run_of_format_2_resumes_to_the_recorded_end(format_2):
    assert_resumes(format_2, distilled_2(format_2))
