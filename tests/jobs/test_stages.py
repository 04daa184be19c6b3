"""Stages: each has its own settings, costs what it says, and together they can cost what a direct run does."""

import dataclasses

import pytest

from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.core.errors import UserError
from endistill_jax.interpolation.assistants import ratios
from endistill_jax.interpolation.stages import equal_compute_steps, plan_stages, stages_table, step_cost
from endistill_jax.jobs import Data, Experiment, Interpolation, Run, StageSettings, Teacher
from endistill_jax.models.t5 import sizes
from endistill_jax.objectives import ForwardKL, Objective, presets, relations
from endistill_jax.train.flops import step_flops
from endistill_jax.train.optimizer import OptimizerConfig

MODELS = ("t5_v1_1_xl", "t5_v1_1_large", "t5_v1_1_base", "student_6x6_768")
XL, LARGE, BASE, STUDENT = (sizes.build(name) for name in MODELS)
EXPERIMENT = Experiment(
    student=STUDENT,
    teacher=Teacher(source="xl", dtype="float32"),
    objective=Objective(terms=(*relations("encoder_self", ("qq",), relation_heads=32), ForwardKL())),
    data=Data(task="none", batch_size=8, inputs_length=64, targets_length=16),
    optimizer=OptimizerConfig(),
    run=Run(steps=1000, seed=3),
)


def plan(experiment=EXPERIMENT, teacher=XL, **interpolation):
    return plan_stages(experiment, teacher, Interpolation(**interpolation))


def cost(*stages):
    return sum(stage.run.steps * step_cost(stage) for stage in stages)


def test_each_stage_teaches_the_next():
    stages = plan()
    assert len(stages) == 4
    assert stages[0].teacher.config == XL and stages[-1].student == STUDENT
    for before, after in zip(stages, stages[1:], strict=False):
        assert after.teacher.config.architecture() == before.student.architecture()
    assert max(ratios(XL, [stage.student for stage in stages[:-1]], STUDENT)) <= 2.5
    assert all(stage.run.steps == 1000 for stage in stages)


def test_assistants_teach_as_the_first_teacher_is_run():
    bfloat16 = dataclasses.replace(XL, dtype="bfloat16", scan_layers=False)
    student = dataclasses.replace(STUDENT, dropout_rate=0.1, remat="dots")
    first, second, *_ = plan(dataclasses.replace(EXPERIMENT, student=student), bfloat16)
    assert (first.student.dtype, first.student.dropout_rate, first.student.remat) == ("float32", 0.1, "dots")
    shape = second.teacher.config
    assert (shape.dtype, shape.dropout_rate, shape.scan_layers) == ("bfloat16", 0, False)


def test_a_stage_has_its_own_settings_and_the_rest_in_common():
    own = StageSettings(
        objective=presets.logits(),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        run=Run(steps=50, seed=9, mesh=(1, -1, 1)),
        init=StudentInit(kind="slice"),
    )
    stages = plan(number=2, stages={1: own, -1: StageSettings(init=StudentInit(kind="slice"))})
    first, second, last = stages
    assert (first.objective, first.optimizer, first.init) == (own.objective, own.optimizer, own.init)
    assert first.run == dataclasses.replace(own.run, seed=3), "the seed is the chain's"
    assert (second.objective, second.run, second.init.kind) == (EXPERIMENT.objective, EXPERIMENT.run, "random")
    assert (last.objective, last.init.kind) == (EXPERIMENT.objective, "slice")
    assert all(each.data == EXPERIMENT.data for each in (first, second, last))


def test_steps_are_given_by_stage():
    assert [stage.run.steps for stage in plan(number=2, steps=(10, 20, 30))] == [10, 20, 30]


def test_assistants_of_ones_own_take_the_place_of_planned_ones():
    assert [stage.student for stage in plan(assistants=(LARGE, BASE))] == [LARGE, BASE, STUDENT]


@pytest.mark.parametrize("shares", [None, (1, 2, 5)])
def test_equal_compute_costs_what_the_direct_run_does(shares):
    stages = plan(number=2, equal_compute=True, shares=shares)
    a_step = step_flops(STUDENT, XL, EXPERIMENT.objective, EXPERIMENT.data.lengths).total
    assert abs(cost(*stages) - 1000 * a_step) <= step_cost(stages[-1]) / 2
    # The steps are as the shares, but for what rounding leaves, which goes to the last stage.
    wanted = shares or (1, 1, 1)
    exact = 1000 * a_step / sum(share * step_cost(stage) for share, stage in zip(wanted, stages, strict=True))
    rounding = sum(step_cost(stage) for stage in stages) / step_cost(stages[-1])
    for share, stage, allowed in zip(wanted, stages, (1, 1, rounding), strict=True):
        assert abs(stage.run.steps - share * exact) <= allowed


def test_equal_compute_by_hand():
    assert equal_compute_steps([10.0, 2.0], 1200.0) == (100, 100)
    assert equal_compute_steps([10.0, 2.0], 1200.0, (1.0, 5.0)) == (60, 300)
    assert equal_compute_steps([7.0, 3.0], 100.0) == (10, 10)
    assert equal_compute_steps([7.0, 3.0], 106.0) == (10, 12), "what rounding leaves goes to the last"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"number": 1, "assistants": (BASE,)}, "both number and assistants"),
        ({"number": 1, "steps": (1, 1), "equal_compute": True}, "both steps and equal_compute"),
        ({"number": 1, "shares": (1, 1)}, "shares divides what equal_compute"),
        ({"number": 1, "shares": (1, 1, 1), "equal_compute": True}, "one number above 0 for each of 2 stages"),
        ({"number": 1, "shares": (), "equal_compute": True}, "one number above 0 for each of 2 stages"),
        (
            {"number": 1, "shares": (1, -1), "equal_compute": True},
            r"shares is \(1, -1\); give a tuple of numbers",
        ),
        ({"number": 1, "shares": (1, "2"), "equal_compute": True}, "give a tuple of numbers above 0"),
        ({"number": 1, "shares": 0.5, "equal_compute": True}, "shares is 0.5; give a tuple of numbers above 0"),
        (
            {"number": 1, "steps": 20000},
            r"steps is 20000; give a tuple of whole numbers above 0, such as \(",
        ),
        ({"number": 1, "steps": (2e4, 5e4)}, r"steps is \(20000.0, 50000.0\); give a tuple of whole numbers"),
        ({"number": 1, "steps": (True, 5)}, "give a tuple of whole numbers above 0"),
        ({"number": 1, "steps": (0, 5)}, "give a tuple of whole numbers above 0"),
        ({"assistants": BASE}, r"; give a tuple of shapes, such as \("),
        ({"number": 1, "steps": (1,)}, r"steps is \(1,\); give one number for each of 2 stages"),
        ({"number": 1, "stages": {3: StageSettings()}}, "has 3, but the stages are 1 to 2"),
        ({"number": 1, "stages": {0: StageSettings()}}, "has 0, but"),
        ({"number": 1, "stages": {2: StageSettings(), -1: StageSettings()}}, "has stage 2 twice, as 2 and -1"),
        ({"number": 0}, "is 0; give 1 or more"),
        ({"assistants": (BASE, LARGE)}, "assistant 2 has .* it must have fewer"),
        ({"keep": "nothing"}, "keep is 'nothing'; choose one of params, all"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, match):
    with pytest.raises(UserError, match=match) as error:
        plan(**settings)
    assert "\n" not in str(error.value)


def test_a_run_too_short_to_share_is_refused():
    with pytest.raises(UserError, match=r"leaves \[0, .*give Run.steps more, or fewer assistants"):
        plan(dataclasses.replace(EXPERIMENT, run=Run(steps=1)), equal_compute=True)


def test_the_table_tells_every_stage_and_the_whole():
    stages = plan(number=1)
    table = stages_table(stages, EXPERIMENT.objective, ["finished", ""])
    lines = table.splitlines()
    assert lines[2].startswith("teacher  24+24 x 2048, 32 x 64, 5120") and "2.8 B" in lines[2] and "2.7 B" in lines[2]
    assert f"{cost(stages[0]):.3g}" in lines[3] and lines[3].endswith("finished")
    assert f"{step_cost(stages[1]) / (8 * 80):.3g}" in lines[4] and "1,000" in lines[4]
    assert f"In all {cost(*stages):.3g} FLOPs" in lines[5]
    assert "state" not in stages_table(stages, EXPERIMENT.objective)


def test_the_table_compares_with_the_direct_run_that_equal_compute_spends():
    costly = Objective(terms=(*EXPERIMENT.objective.terms, *relations("cross", ("qk", "vv"), relation_heads=32)))
    for number in (1, -1):
        stages = plan(number=2, equal_compute=True, stages={number: StageSettings(objective=costly)})
        assert "as many as 1,000 steps from the teacher" in stages_table(stages, EXPERIMENT.objective)
