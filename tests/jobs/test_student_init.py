"""A distillation that starts from its teacher: it does, it resumes without doing so again, and the setting is kept."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.manager import restore_params
from endistill_jax.checkpoints.models import open_model
from endistill_jax.core.errors import UserError
from endistill_jax.jobs import Experiment, StudentInit, distill
from endistill_jax.train import run as execution
from endistill_jax.train.state import init_state

INIT = StudentInit(kind="layers", decoder_layers=(1,))


@pytest.fixture(scope="module")
def warm(experiment, make_model) -> Experiment:
    return dataclasses.replace(
        experiment,
        student=dataclasses.replace(make_model(width=32), num_decoder_layers=1),
        teacher=dataclasses.replace(experiment.teacher, dtype="float32"),
        init=INIT,
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory, warm) -> tuple[pathlib.Path, list]:
    """A finished run, and the states it was started from."""
    folder, states = tmp_path_factory.mktemp("started") / "run", []

    def noted(*given, **named):
        states.append(jax.device_get(init_state(*given, **named)))
        return init_state(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "init_state", noted)
        distill(model_dir=str(folder), experiment=warm)
    return folder, states


def test_the_run_starts_from_the_teachers_layers(started, teacher):
    (state,) = started[1]
    expected = jax.device_get(open_model(teacher).load())
    expected["decoder"]["layers"] = jax.tree.map(lambda leaf: leaf[[1]], expected["decoder"]["layers"])
    jax.tree.map(np.testing.assert_array_equal, expected, state.params)
    assert state.step == 0


def test_a_resumed_run_ends_alike_and_does_not_start_from_the_teacher_again(started, warm, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(started[0], folder)
    shutil.rmtree(folder / "checkpoints" / "4")  # as if it had been killed after step 2

    def refuse(*given, **named):
        raise AssertionError("a resumed run has parameters already")

    monkeypatch.setattr(execution, "init_from_teacher", refuse)
    result = distill(model_dir=str(folder), experiment=warm)
    expected = restore_params(str(started[0] / "checkpoints"))[0]
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(result.params))


@pytest.mark.parametrize(
    ("init", "told"),
    [
        (StudentInit(), r'student_init\.kind is "layers" there and "random" here'),
        (StudentInit(kind="layers"), r"student_init\.decoder_layers is \[1\] there and \[0\] here"),
    ],
)
def test_a_run_that_started_otherwise_is_not_resumed(started, warm, init, told):
    with pytest.raises(UserError, match=told):
        distill(model_dir=str(started[0]), experiment=dataclasses.replace(warm, init=init))


def test_a_start_that_does_not_fit_is_refused_before_anything_is_created(refused, warm, tmp_path):
    narrow = dataclasses.replace(warm, student=dataclasses.replace(warm.student, d_model=16))
    match = "d_model is 16 and the teacher's 32; make them equal, or choose 'slice'"
    refused(distill, match, model_dir=str(tmp_path / "run"), experiment=narrow)
    with pytest.raises(UserError, match="both initial_checkpoint and init"):
        dataclasses.replace(warm, initial_checkpoint="somewhere")


def test_a_dry_run_says_which_layers_the_student_starts_from(warm, tmp_path, capsys):
    distill(model_dir=str(tmp_path / "run"), experiment=warm, dry_run=True)
    assert "init: {'kind': 'layers', 'encoder_layers': [0, 1], 'decoder_layers': [1]}" in capsys.readouterr().out
