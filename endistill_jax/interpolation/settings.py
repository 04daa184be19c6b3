"""Settings of interpolated distillation: assistants, and per-stage overrides."""

import dataclasses
import functools
from collections.abc import Mapping

from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.core.errors import UserError, as_tuple, is_positive, is_whole
from endistill_jax.interpolation.assistants import LARGEST_RATIO
from endistill_jax.models.family import ModelConfig
from endistill_jax.objectives import Objective
from endistill_jax.train.experiment import Run
from endistill_jax.train.optimizer import OptimizerConfig

KEEP = ("params", "all")
# Of settings that list things: what, and which are right.
LISTED = {
    "assistants": ("shapes, such as (@first/sizes.build(),)", lambda each: hasattr(each, "architecture")),
    "steps": ("whole numbers above 0, such as (20000, 50000)", functools.partial(is_whole, least=1)),
    "shares": ("numbers above 0, such as (1, 1.5)", is_positive),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Overrides of one stage; None keeps the common setting.

    Attributes:
        objective: of the stage.
        optimizer: optimizer and learning-rate schedule.
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
        for name, (wanted, fits) in LISTED.items():
            if getattr(self, name) is not None:
                given = as_tuple(getattr(self, name), f"Interpolation.{name}", wanted, fits)
                object.__setattr__(self, name, given)
        stages = self.stages
        if not isinstance(stages, Mapping) or not all(isinstance(each, StageSettings) for each in stages.values()):
            raise UserError(
                f"Interpolation.stages is {stages!r}; give settings by number of the stage, such as "
                "{1: @first/jobs.StageSettings()}"
            )
        if self.keep not in KEEP:
            raise UserError(f"Interpolation.keep is {self.keep!r}; choose one of {', '.join(KEEP)}")
        if self.number is not None and self.assistants is not None:
            raise UserError("Interpolation has both number and assistants; give the number, or their shapes")
        if self.equal_compute and self.steps is not None:
            raise UserError("Interpolation has both steps and equal_compute, which chooses them; give one")
        if self.shares is not None and not self.equal_compute:
            raise UserError(
                "Interpolation.shares divides what equal_compute = True gives; set it, or give steps instead"
            )

    def by_stage(self, count: int) -> dict[int, StageSettings]:
        """Per-stage overrides, by number from 1.

        Raises:
            UserError: for a stage that does not exist, or is given twice.
        """
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


FEWEST = Interpolation()
