"""The stages of interpolated distillation: their settings, and the teacher, student, length and cost of each.

A chain goes from the teacher over its assistants to the student. Each stage is an ordinary distillation, whose student
is the next stage's teacher.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.core.errors import UserError, as_tuple, is_positive, is_whole, require_choice
from endistill_jax.interpolation.assistants import (
    LARGEST_RATIO,
    check_assistants,
    non_embedding_params,
    plan_assistants,
)
from endistill_jax.models.family import ModelConfig
from endistill_jax.objectives import Objective
from endistill_jax.reports.table import Column, plain_table
from endistill_jax.train.experiment import Experiment, Run
from endistill_jax.train.flops import step_flops
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.training import as_teacher

# Settings that list things: what they list, and whether an item is valid.
_LISTS = {
    "assistants": ("shapes, such as (@first/sizes.build(),)", lambda each: hasattr(each, "architecture")),
    "steps": ("whole numbers above 0, such as (20000, 50000)", functools.partial(is_whole, least=1)),
    "shares": ("numbers above 0, such as (1, 1.5)", is_positive),
}
_COLUMNS = (
    Column(key="stage", title="stage"),
    Column(key="shape", title="layers x width, heads, MLP"),
    Column(key="parameters", title="parameters", kind="count"),
    Column(key="body", title="non-embedding", kind="count"),
    Column(key="ratio", title="ratio", kind="number"),
    Column(key="token_flops", title="FLOPs a token", kind="number"),
    Column(key="steps", title="steps", kind="number"),
    Column(key="flops", title="FLOPs", kind="number"),
    Column(key="share", title="share", kind="share"),
    Column(key="state", title="state"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Overrides of one stage; None keeps the common setting.

    Attributes:
        run: length, mesh, logging and checkpoints. Its `steps` are the stage's, unless `Interpolation` sets them; its
            seed is that of the chain's run.
        init: how its student is initialized.
    """

    objective: Objective | None = None
    optimizer: OptimizerConfig | None = None
    run: Run | None = None
    init: StudentInit | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The stages between teacher and student.

    Attributes:
        number: of assistants; None takes the fewest that keep every stage's ratio of non-embedding parameters at or
            under `largest_ratio`, which may be none. See `assistants.plan_assistants`.
        largest_ratio: see `number`.
        assistants: their shapes, largest first, instead of planned ones.
        steps: of each stage, the first stage first; None takes those of each stage's run.
        equal_compute: choose the steps so that all stages together take the operations of a direct distillation of
            as many steps as the job's run has.
        shares: with `equal_compute`, ratios of the stages' steps, such as (1, 1, 2); None makes them equal.
        stages: per-stage overrides by number of the stage, from 1 (-1 is the last).
        keep: what is kept of a finished stage that teaches the next: "params" a params-only checkpoint, "all" its
            checkpoints, as of any run. The last stage's are always kept.
    """

    number: int | None = None
    largest_ratio: float = LARGEST_RATIO
    assistants: tuple[ModelConfig, ...] | None = None
    steps: tuple[int, ...] | None = None
    equal_compute: bool = False
    shares: tuple[float, ...] | None = None
    stages: Mapping[int, StageSettings] = dataclasses.field(default_factory=dict)
    keep: str = "params"

    def __post_init__(self):
        for name, (wanted, fits) in _LISTS.items():
            if getattr(self, name) is not None:
                given = as_tuple(getattr(self, name), f"Interpolation.{name}", wanted, fits)
                object.__setattr__(self, name, given)
        stages = self.stages
        if not isinstance(stages, Mapping) or not all(isinstance(each, StageSettings) for each in stages.values()):
            raise UserError(
                f"Interpolation.stages is {stages!r}; give settings by number of the stage, such as "
                "{1: @first/jobs.StageSettings()}"
            )
        require_choice(self, keep=("params", "all"))
        if self.number is not None and self.assistants is not None:
            raise UserError("Interpolation has both number and assistants; give the number, or their shapes")
        if self.equal_compute and self.steps is not None:
            raise UserError("Interpolation has both steps and equal_compute, which chooses them; give one")
        if self.shares is not None and not self.equal_compute:
            raise UserError(
                "Interpolation.shares divides what equal_compute = True gives; set it, or give steps instead"
            )

    def by_stage(self, count: int) -> dict[int, StageSettings]:
        """Per-stage overrides, by number from 1."""
        by_stage: dict[int, StageSettings] = {}
        for number, settings in self.stages.items():
            if not isinstance(number, int) or not 1 <= abs(number) <= count:
                raise UserError(
                    f"Interpolation.stages has {number!r}, but the stages are 1 to {count} (-1 is the last)"
                )
            place = number if number > 0 else count + 1 + number
            if place in by_stage:
                raise UserError(f"Interpolation.stages has stage {place} twice, as {place} and {place - count - 1}")
            by_stage[place] = settings
        return by_stage


def step_cost(stage: Experiment) -> int:
    """Operations of one training step of a stage, by formula."""
    return step_flops(stage.student, stage.teacher.config, stage.objective, stage.data.lengths).total


def plan_stages(experiment: Experiment, teacher: ModelConfig, interpolation: Interpolation) -> tuple[Experiment, ...]:
    """The stages from teacher to student; each has its teacher's shape, and only the first a teacher that exists.

    Args:
        experiment: the distillation straight from teacher to student. Assistants have its student's kind of layers, its
            vocabulary and its way of execution; stages have its settings where they have none of their own; and
            `equal_compute` compares with it.
        teacher: the teacher's shape, as it is run; assistants are run alike when they teach.
        interpolation: assistants and per-stage overrides.
    """
    student = experiment.student
    objectives = [experiment.objective, *(own.objective for own in interpolation.stages.values() if own.objective)]
    assistants = interpolation.assistants
    if assistants is None:
        assistants = plan_assistants(
            teacher,
            student,
            number=interpolation.number,
            largest_ratio=interpolation.largest_ratio,
            relation_heads=tuple(heads for objective in objectives for heads in objective.relation_heads),
        )
    check_assistants(teacher, assistants, student)
    students = (*assistants, student)
    teachers = (teacher, *(as_teacher(each, teacher.dtype, teacher.scan_layers) for each in assistants))

    def stage(shape: ModelConfig, student: ModelConfig, own: StageSettings) -> Experiment:
        overrides = {name: value for name, value in vars(own).items() if value is not None}
        with_shape = dataclasses.replace(experiment.teacher, config=shape)
        return dataclasses.replace(experiment, student=student, teacher=with_shape, **overrides)

    overrides = interpolation.by_stage(len(students))
    stages = [
        stage(shape, model, overrides.get(number, StageSettings()))
        for number, (shape, model) in enumerate(zip(teachers, students, strict=True), 1)
    ]
    direct = stage(teacher, student, StageSettings())
    steps = _steps(interpolation, stages, direct.run.steps * step_cost(direct))
    return tuple(
        dataclasses.replace(stage, run=dataclasses.replace(stage.run, steps=count, seed=experiment.run.seed))
        for stage, count in zip(stages, steps, strict=True)
    )


def _steps(interpolation: Interpolation, stages: Sequence[Experiment], direct: float) -> tuple[int, ...]:
    """The steps of each stage; `direct` are the operations of the direct distillation."""
    if interpolation.equal_compute:
        return equal_compute_steps([step_cost(stage) for stage in stages], direct, interpolation.shares)
    if interpolation.steps is None:
        return tuple(stage.run.steps for stage in stages)
    if len(interpolation.steps) != len(stages):
        raise UserError(
            f"Interpolation.steps is {interpolation.steps}; give one number for each of {len(stages)} stages"
        )
    return interpolation.steps


def equal_compute_steps(
    step_costs: Sequence[float], total: float, shares: Sequence[float] | None = None
) -> tuple[int, ...]:
    """How many steps each stage has so that all of them together cost `total`, to half a step of the last.

    Args:
        step_costs: operations of one step of each stage.
        total: operations of all steps together, such as those of a direct distillation.
        shares: ratios of the numbers of steps; None makes them equal.
    """
    if shares is None:
        shares = (1.0,) * len(step_costs)
    if len(shares) != len(step_costs):
        raise UserError(
            f"Interpolation.shares is {tuple(shares)}; give one number above 0 for each of {len(step_costs)} stages"
        )
    unit = total / sum(share * cost for share, cost in zip(shares, step_costs, strict=True))
    steps = [int(unit * share) for share in shares[:-1]]
    left = total - sum(count * cost for count, cost in zip(steps, step_costs, strict=False))
    steps.append(round(left / step_costs[-1]))
    if min(steps) < 1:
        raise UserError(
            f"Interpolation.equal_compute leaves {steps} steps to the stages; give Run.steps more, or fewer assistants"
        )
    return tuple(steps)


def stages_table(stages: Sequence[Experiment], objective: Objective, states: Sequence[str] = ()) -> str:
    """The stages as plain text, the teacher first.

    Args:
        stages: from `plan_stages`.
        objective: of the direct distillation that all of them are compared with.
        states: the status of each; none where none has begun.
    """
    total = sum(stage.run.steps * step_cost(stage) for stage in stages)
    rows = [{"stage": "teacher", **_size(stages[0].teacher.config)}]
    for number, stage in enumerate(stages, 1):
        batch, source, target = stage.data.lengths
        cost = step_cost(stage)
        rows.append(
            {
                "stage": f"stage {number}",
                **_size(stage.student),
                "ratio": rows[-1]["body"] / non_embedding_params(stage.student),
                "token_flops": f"{cost / (batch * (source + target)):.3g}",
                "steps": f"{stage.run.steps:,}",
                "flops": f"{stage.run.steps * cost:.3g}",
                "share": stage.run.steps * cost / total,
            }
        )
    for row, state in zip(rows[1:], states, strict=False):
        row["state"] = state
    columns = [column for column in _COLUMNS if column.key != "state" or any(states)]
    direct = dataclasses.replace(stages[-1], objective=objective, teacher=stages[0].teacher)
    return (
        f"{plain_table(rows, columns)}"
        f"In all {total:.3g} FLOPs, as many as {total / step_cost(direct):,.0f} steps from the teacher straight to the "
        "student. Tokens are positions, padding included.\n"
    )


def _size(config: ModelConfig) -> dict[str, Any]:
    depths = f"{config.num_encoder_layers}+{config.num_decoder_layers}"
    body = non_embedding_params(config)
    return {
        "shape": f"{depths} x {config.d_model}, {config.num_heads} x {config.head_dim}, {config.mlp_dim}",
        "body": body,
        "parameters": body + (1 if config.tied_head else 2) * config.vocab_size * config.d_model,
    }
