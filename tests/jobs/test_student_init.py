"""A distillation that starts from its teacher: it does, it resumes without doing so again, and the setting is kept."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from endistill_jax.checkpoints.models import open_model
from endistill_jax.checkpoints.reading import restore_params
from endistill_jax.core.errors import UserError
from endistill_jax.jobs import StudentInit, distill
from endistill_jax.train import run as execution
from endistill_jax.train.state import init_state

INIT = StudentInit(kind="layers", decoder_layers=(1,))


@pytest.fixture(scope="module")
def arguments(teacher, make_model, path, settings):
    student = dataclasses.replace(make_model(width=32), num_decoder_layers=1)
    return {"teacher": teacher, "student": student, "path": path, "teacher_dtype": "float32"} | settings


@pytest.fixture(scope="module")
def started(tmp_path_factory, arguments) -> tuple[pathlib.Path, list]:
    """A finished run, and the states it was started from."""
    folder, states = tmp_path_factory.mktemp("started") / "run", []

    def noted(*given):
        states.append(jax.device_get(init_state(*given)))
        return init_state(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "init_state", noted)
        distill(model_dir=str(folder), student_init=INIT, **arguments)
    return folder, states


def test_the_run_starts_from_the_teachers_layers(started, teacher):
    (state,) = started[1]
    expected = jax.device_get(open_model(teacher).load())
    expected["decoder"]["layers"] = jax.tree.map(lambda leaf: leaf[[1]], expected["decoder"]["layers"])
    jax.tree.map(np.testing.assert_array_equal, expected, state.params)
    assert state.step == 0


def test_a_resumed_run_ends_alike_and_does_not_start_from_the_teacher_again(started, arguments, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(started[0], folder)
    shutil.rmtree(folder / "checkpoints" / "4")  # as if it had been killed after step 2

    def refuse(*given, **named):
        raise AssertionError("a resumed run has parameters already")

    monkeypatch.setattr(execution, "init_from_teacher", refuse)
    result = distill(model_dir=str(folder), student_init=INIT, **arguments)
    expected = restore_params(str(started[0] / "checkpoints"))[0]
    jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(result.params))


@pytest.mark.parametrize(
    ("init", "told"),
    [
        (StudentInit(), r'student_init\.kind is "layers" there and "random" here'),
        (StudentInit(kind="layers"), r"student_init\.decoder_layers is \[1\] there and \[0\] here"),
    ],
)
def test_a_run_that_started_otherwise_is_not_resumed(started, arguments, init, told):
    with pytest.raises(UserError, match=told):
        distill(model_dir=str(started[0]), student_init=init, **arguments)


def test_a_start_that_does_not_fit_is_refused_before_anything_is_created(arguments, tmp_path):
    narrow = dataclasses.replace(arguments["student"], d_model=16)
    with pytest.raises(UserError, match="d_model is 16 and the teacher's 32; make them equal, or choose 'slice'"):
        distill(model_dir=str(tmp_path / "run"), student_init=INIT, **arguments | {"student": narrow})
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_which_layers_the_student_starts_from(arguments, tmp_path, capsys):
    distill(model_dir=str(tmp_path / "run"), student_init=INIT, **arguments, dry_run=True)
    assert (
        "student_init: {'kind': 'layers', 'encoder_layers': [0, 1], 'decoder_layers': [1]}" in capsys.readouterr().out
    )
