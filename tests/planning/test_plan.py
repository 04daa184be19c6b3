"""Plans as users ask for them: through the command line, with nothing but a gin file."""

import importlib.util
import inspect
import json
import pathlib

import pytest

import gin
from endistill_jax.core.errors import UserError
from endistill_jax.main import main
from endistill_jax.models.t5.config import T5Config
from endistill_jax.planning import compiling
from endistill_jax.train.step import make_train_step
from endistill_jax.train.training import as_teacher, check_shape

RUN = """
from __gin__ import dynamic_registration
from endistill_jax import jobs
from endistill_jax.models.t5 import sizes

include 'gin/miniend_distill.gin'

STUDENT = 'mini_2x2_128'
VOCAB_SIZE = 64
RELATION_HEADS = 4
INPUTS_LENGTH = 16
TARGETS_LENGTH = 8
BATCH_SIZE = 16
STEPS = 100
WARMUP_STEPS = 10
MESH = (1, -1, 1)
student/sizes.build:
    d_model = 32
    head_dim = 8
    mlp_dim = 64
    scan_layers = True
jobs.Teacher.config = @teacher/sizes.build()
teacher/sizes.build:
    size = 'mini_4x4_256'
    vocab_size = 64
    d_model = 64
    num_heads = 8
    head_dim = 8
    mlp_dim = 96
    num_encoder_layers = 3
    num_decoder_layers = 3
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which a plan sets
    pathlib.Path("run.gin").write_text(RUN)
    yield tmp_path
    gin.clear_config()


def refused(capsys, *words):
    """The one line of a refusal."""
    assert main(["--gin_file=run.gin", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plan"], "--topology is empty"),
        (["--plan", "--topology=v9:4x4"], "v5e:4x4 (v5e-16)"),
        (["--plan", "--topology=cpu:8", "--sweep=size"], "there is no axis 'size'"),
        (["--plan", "--topology=cpu:8", "--price=-1"], "--price is -1"),
        (["--plan", "--topology=cpu:8", "--plan_memory=inf"], "--plan_memory is inf"),
        (["--plan", "--topology=cpu:8", "--plan_dir=run.gin/plans"], "cannot be a folder: "),
        (["--plan", "--topology=cpu:8", "--gin.jobs.Teacher.config=None"], "a plan needs the teacher's shape"),
        (["--topology=v5e-16", "--dry_run"], "--topology is for --plan alone"),
        (["--sweep"], "--sweep is for --plan alone"),
        (["--plann"], "did you mean --plan?"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_before_anything(capsys, words, told):
    assert told in refused(capsys, *words)
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["run.gin"]


def test_a_job_that_trains_nothing_has_no_plan(capsys):
    pathlib.Path("run.gin").write_text("include 'gin/runs/export.gin'\n")
    assert "has no step to plan" in refused(capsys, "--plan", "--topology=cpu:8")


def test_what_an_objective_cannot_compare_is_refused_before_anything_is_compiled(capsys):
    assert "relation_heads" in refused(capsys, "--plan", "--topology=cpu:8", "--gin.RELATION_HEADS=7")
    assert not pathlib.Path("plans").exists()


def test_a_teacher_of_another_shape_than_planned_is_refused():
    shape = T5Config(
        vocab_size=64, d_model=32, num_heads=4, head_dim=8, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=2
    )
    check_shape("/models/xl", as_teacher(shape, "bfloat16", False), shape, "the teacher")
    other = T5Config(**shape.architecture() | {"d_model": 16})
    with pytest.raises(UserError, match="/models/xl.*d_model 16 instead of 32"):
        check_shape("/models/xl", other, shape, "the teacher")


def test_the_worker_hands_on_every_setting_of_the_training_step(make_request, monkeypatch):
    """A setting that training has and planning forgets would plan another step."""
    given = {}

    def spy(**settings):
        given.update(settings)
        return make_train_step(**settings)

    monkeypatch.setattr(compiling, "make_train_step", spy)
    request = make_request("cpu:1", micro_batches=2, teacher_sharding="replicated")
    found = compiling.compile_step(request)
    assert set(given) == set(inspect.signature(make_train_step).parameters)
    assert (given["micro_batches"], given["teacher_sharding"]) == (2, "replicated")
    held = found["held"]
    assert held["student"] == 4 * found["student_params"]
    assert 2 * held["student"] < held["optimizer"] < 2 * held["student"] + 64
    assert held["teacher"] == 4 * found["teacher_params"]  # float32 in this request
    unread = 4 * 8 * (16 + 8)  # positions of packed examples: T5 has none of its own
    assert found["memory"]["arguments"] == sum(held.values()) - unread


@pytest.mark.slow
def test_a_plan_needs_no_checkpoint_no_task_and_no_folder(capsys):
    words = ["--gin_file=run.gin", "--plan", "--topology=cpu:8,cpu:3,h100:8", "--price=2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "cpu:8: 8 chips, proxy" in out and "1 x 8 x 1" in out and "chip-hours of the run" in out
    good, refused, priced = json.loads(pathlib.Path("plans/run/plan.json").read_text())
    assert good["status"] == "proxy" and good["run"] is None
    assert refused["status"] == "refused" and "3" in refused["reason"]  # 3 devices do not divide the widths: a row
    assert priced["run"]["cost"]["least"] == pytest.approx(2 * priced["run"]["chip_hours"]["least"])
    # The teacher lies in bfloat16 over eight devices, the student and its two moments in float32.
    held, kinds = good["found"]["held"], {each["kind"] for each in good["found"]["collectives"]}
    assert held["student"] < 4 * good["found"]["student_params"] / 7
    assert held["teacher"] < 2 * good["found"]["teacher_params"] / 7
    assert {"all-gather", "all-reduce"} <= kinds
    assert pathlib.Path("plans/run/plan.md").read_text().count("## ") == 3


def test_a_batch_that_training_would_refuse_is_refused(make_request):
    with pytest.raises(UserError, match="^Data.batch_size is 8; it must be a multiple of 3"):
        compiling.compile_step(make_request("cpu:1", micro_batches=3))


@pytest.mark.slow
def test_an_evaluation_that_training_would_refuse_is_refused(capsys):
    words = ["--gin_file=run.gin", "--plan", "--topology=cpu:8", "--gin.jobs.Data.eval_batch_size=12"]
    assert main(words) == 2
    assert "nothing of what was planned fits" in capsys.readouterr().err
    [row] = json.loads(pathlib.Path("plans/run/plan.json").read_text())
    assert row["status"] == "refused" and "Data.eval_batch_size is 12; it must be a multiple of 8" in row["reason"]


@pytest.mark.slow
def test_a_sweep_ranks_what_it_tried(capsys):
    words = ["--gin_file=run.gin", "--plan", "--topology=h100:4", "--sweep=batch=4,2", "--sweep=mesh=4x1x1,1x4x1"]
    assert main(words) == 0
    rows = json.loads(pathlib.Path("plans/run/sweep.json").read_text())
    assert [row["batch_per_chip"] for row in rows] == [4, 4]  # the larger fits, so the smaller is not tried
    assert {tuple(row["found"]["mesh"].values()) for row in rows} == {(4, 1, 1), (1, 4, 1)}
    tokens = [row["run"]["tokens_a_day"]["most"] for row in rows]
    assert tokens == sorted(tokens, reverse=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the extra `plan`)")
def test_a_tpu_slice_is_compiled_for_without_one(capsys):
    assert main(["--gin_file=run.gin", "--plan", "--topology=v5e:2x2", "--gin.MESH=(1, 4, 1)"]) == 0
    [row] = json.loads(pathlib.Path("plans/run/plan.json").read_text())
    assert row["status"] == "fits" and 0 < row["memory_per_chip"] < 2**30
    assert row["step_seconds"]["least"] > 0
    assert row["found"]["flops"] * 4 == pytest.approx(row["model_flops"], rel=0.5)
    assert "v5e:2x2: 4 chips, fits" in capsys.readouterr().out
