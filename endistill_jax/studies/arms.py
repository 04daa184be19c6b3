"""The arms of a study as ordinary runs for every seed, each with the fine-tunings by which its student is compared."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.manifest import plain
from endistill_jax.checkpoints.models import TrainedModel, open_model
from endistill_jax.checkpoints.student_init import RANDOM, StudentInit
from endistill_jax.core.errors import UserError, naming
from endistill_jax.interpolation.chain import Chain, plan_chain
from endistill_jax.interpolation.stages import Interpolation
from endistill_jax.models.family import ModelConfig, abstract_params, count_params
from endistill_jax.objectives import Objective
from endistill_jax.studies.report import check_packages
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.finetuning import Finetuning, check_runs, plan_runs
from endistill_jax.train.flops import step_flops
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.training import Training, is_finished, last_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the ways to train a student that a study compares. What is None is the study's.

    Attributes:
        steps: optimizer updates; with an interpolation of each stage, or of the direct run whose compute it spends.
        interpolation: distills over assistants; None straight from the teacher.
    """

    objective: Objective
    optimizer: OptimizerConfig | None = None
    student: ModelConfig | None = None
    init: StudentInit = RANDOM
    steps: int | None = None
    interpolation: Interpolation | None = None

    def __post_init__(self):
        if self.steps is not None and self.interpolation is not None and self.interpolation.steps is not None:
            raise UserError("Arm has steps and an interpolation with steps of each stage; give one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of initial parameters, data order and dropout, of the fine-tuning too.
        trainings: the stages of its chain in order; without a chain one, from the study's teacher if from any.
        chain: None for an arm without interpolation.
        tasks: name -> how the student is fine-tuned.
    """

    arm: str
    seed: int
    trainings: tuple[Training, ...]
    chain: Chain | None
    tasks: Mapping[str, Finetuning]

    @property
    def training(self) -> Training:
        """The one whose student is compared."""
        return self.trainings[-1]

    @property
    def has_ended(self) -> bool:
        """Whether all its trainings and fine-tunings have."""
        folders = [training.model_dir for training in self.trainings]
        folders += [self._folder_of(task) for task in self.tasks]
        return all(is_finished(last_manifest(folder)[1]) for folder in folders)

    def check(self, mesh: Mesh) -> None:
        """Finds what would go wrong later, in the training or the fine-tunings; reads no example.

        Args:
            mesh: where students are evaluated.
        """
        with naming(f"arm {self.arm}"):
            for number, training in enumerate(self.trainings, 1):
                with naming(f"stage {number}") if self.chain else contextlib.nullcontext():
                    _check_comparable(training, mesh)
            if self.chain is None:
                self.training.check()
                self.training.check_saved()
            else:
                self.chain.check()
            own = fingerprint_vocabulary(self.training.vocabulary())
            for task, how in self.tasks.items():
                with naming(f"task {task}"):
                    finetuning = self.finetuning_of(task, self.training.student)
                    check_runs([finetuning], how)
                    if fingerprint_vocabulary(finetuning.vocabulary()) != own:
                        raise UserError(
                            f"its vocabulary is not that of {self.training.task().name}; choose one that has it"
                        )

    def finetuning_of(self, task: str, model: TrainedModel | ModelConfig) -> Training:
        """The fine-tuning of a model, or of a shape, on one of the tasks, with the run's seed."""
        how = self.tasks[task]
        how = dataclasses.replace(how, run=dataclasses.replace(how.run, seed=self.seed))
        (training,) = plan_runs(self._folder_of(task), model, how, f"{self.arm}, seed {self.seed}, {task}")
        return dataclasses.replace(training, may_continue=False)

    def finetunings(self) -> Iterator[tuple[str, Training]]:
        """The fine-tunings of the trained student, which must be there, by the names of their tasks."""
        student = open_model(self.training.model_dir)
        for task in self.tasks:
            yield task, self.finetuning_of(task, student)
        student.release()

    def settings(self) -> dict[str, Any]:
        """What the run trains with, as plain values; several stages have each their own in `stages`."""
        stages = [_settings_of(training) for training in self.trainings]
        return stages[-1] | {
            "steps": [stage["steps"] for stage in stages],
            "flops": sum(stage["flops"] for stage in stages),
            "stages": stages if self.chain else [],
        }

    def _folder_of(self, task: str) -> str:
        return f"{self.training.model_dir}/{task}"


def plan_study(
    model_dir: str,
    experiment: Experiment,
    teacher: TrainedModel,
    arms: Mapping[str, Arm],
    *,
    seeds: tuple[int, ...],
    tasks: Mapping[str, Finetuning],
) -> list[StudyRun]:
    """A run for every seed and arm, seed after seed, so that a study that was stopped has complete comparisons."""
    check_packages()

    def planned(name: str, arm: Arm, seed: int) -> StudyRun:
        folder, label = f"{model_dir}/{name}/seed_{seed}", f"{name}, seed {seed}"
        of_arm = arm_experiment(experiment, arm, seed)
        if arm.interpolation is not None:
            with naming(f"arm {name}"):
                chain = plan_chain(folder, of_arm, teacher, arm.interpolation, label)
            return StudyRun(arm=name, seed=seed, trainings=chain.trainings, chain=chain, tasks=tasks)
        own = None if of_arm.teacher is None else teacher
        training = Training(model_dir=folder, experiment=of_arm, teacher=own, label=label, may_continue=False)
        return StudyRun(arm=name, seed=seed, trainings=(training,), chain=None, tasks=tasks)

    return [planned(name, arm, seed) for seed in seeds for name, arm in arms.items()]


def arm_experiment(experiment: Experiment, arm: Arm, seed: int) -> Experiment:
    """The study's experiment as an arm changes it."""
    run = dataclasses.replace(experiment.run, seed=seed, steps=experiment.run.steps if arm.steps is None else arm.steps)
    reads_teacher = arm.objective.needs_teacher or arm.init.kind != "random"
    return dataclasses.replace(
        experiment,
        student=arm.student or experiment.student,
        objective=arm.objective,
        optimizer=arm.optimizer or experiment.optimizer,
        run=run,
        init=arm.init,
        teacher=experiment.teacher if reads_teacher else None,
    )


def _check_comparable(training: Training, mesh: Mesh) -> None:
    if training.run.patience is not None:
        raise UserError("its run has a patience, but arms are compared after equal steps; leave Run.patience None")
    if training.mesh() != mesh:
        raise UserError(
            f"its run has the mesh {training.run.mesh}, but students are evaluated on another, that of study.run; "
            "make Run.mesh and slices equal"
        )


def _settings_of(training: Training) -> dict[str, Any]:
    experiment = training.experiment
    cost = step_flops(training.student, training.teacher_config, training.objective, experiment.data.lengths).total
    return {
        "objective": plain(training.objective.described()),
        "terms": sorted(training.objective.term_names),
        "optimizer": plain(experiment.optimizer),
        "student": training.student.architecture(),
        "parameters": count_params(abstract_params(training.student)),
        "init": plain(experiment.init),
        "steps": training.run.steps,
        "flops": training.run.steps * cost,
    }
