"""A chain of distillations in one model directory: planned, checked, run stage by stage, and resumed.

Each stage is an ordinary run in a folder `stage_<n>` of the model directory; the last one's student is the chain's. Of
a finished stage that teaches the next only a params-only checkpoint is kept, a model directory within the stage's:

    stage_<n>/product/checkpoints/<step>    parameters and manifest, without optimizer state or data positions
    stage_<n>/product/tokenizer/

It is written, read back and compared before any checkpoint of the run is removed, at every start that finds checkpoints
next to it, so one of the two is complete whenever the process ends. Everything that opens the stage's folder finds it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from endistill_jax.checkpoints.manager import Checkpointer, finished_steps
from endistill_jax.checkpoints.manifest import Manifest
from endistill_jax.checkpoints.models import CHECKPOINTS, PRODUCT, TrainedModel, keep_tokenizer, lazy_model, open_model
from endistill_jax.core.errors import UserError, naming
from endistill_jax.evaluation import Evaluation
from endistill_jax.interpolation.stages import Interpolation, plan_stages, stages_table
from endistill_jax.models.family import ModelConfig
from endistill_jax.multihost import agree
from endistill_jax.objectives import Objective
from endistill_jax.storage import stored_path
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.progress import Progress
from endistill_jax.train.run import train
from endistill_jax.train.training import Training, is_finished, last_manifest


@dataclasses.dataclass(kw_only=True)
class StageResult(Progress):
    """What a stage ended with, now or when it was run earlier.

    Attributes:
        model_dir: a model directory: of `open_model`, `export` and every other job.
        config: its student.
        metrics: of the last evaluation, by name.
    """

    model_dir: str
    config: ModelConfig
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages that were planned and not started.

    Attributes:
        trainings: the stages as ordinary runs; the teacher of all but the first is read once it is there.
        objective: of the direct distillation that they are compared with.
        keep: see `Interpolation.keep`.
    """

    trainings: tuple[Training, ...]
    objective: Objective
    keep: str = "params"

    def check(self) -> None:
        """Finds what would go wrong later, in any stage, before anything is created; reads no example."""
        for number, training in enumerate(self.trainings, 1):
            with naming(f"stage {number}"):
                training.check()
        self.stage_status()

    def describe(self) -> str:
        """The table of the stages: shape, parameters, ratio, operations, steps, and status."""
        states = []
        for step, manifest in self.stage_status():
            states.append("finished" if is_finished(manifest) else f"at step {step}" if manifest else "")
        return stages_table([training.experiment for training in self.trainings], self.objective, states)

    def stage_status(self) -> list[tuple[int, Manifest]]:
        """The last step that each stage saved, and its manifest; 0 and nothing where there is none.

        Raises:
            UserError: a stage has other settings or another teacher, or is incomplete.
        """
        found: list[tuple[int, Manifest]] = []
        for number, training in enumerate(self.trainings, 1):
            with naming(f"stage {number}", functools.partial(self._advice, number)):
                step, manifest = last_manifest(training.model_dir)
                product = stored_path(training.model_dir) / PRODUCT
                if product.exists() and not manifest:
                    raise UserError(f"{product} is incomplete")  # and not a stage to run from scratch
            if manifest:
                if found and not is_finished(found[-1][1]):
                    raise UserError(
                        f"stage {number} was started in {training.model_dir}, but stage {number - 1}, its teacher, is "
                        f"not complete; {self._advice_on_folder(number - 1)}"
                    )
                with naming(f"stage {number}"):
                    training.check_resumes(step, manifest, contents=False)
                if is_finished(manifest) or number == 1:
                    self._check_teacher(number, manifest)
            found.append((step, manifest))
        agree("stages", {str(number): step for number, (step, _) in enumerate(found, 1)})
        return found

    def _check_teacher(self, number: int, manifest: Manifest) -> None:
        """Checks that a stage had the teacher of this chain, whose content is read only where nothing else decides."""
        teacher = self.trainings[number - 1].teacher
        known = _stored_fingerprint(teacher.source) if number > 1 else None
        if known is not None or manifest["teacher"]["source"] != teacher.source:
            self._check_fingerprint(number, manifest, known or teacher.fingerprint)

    def _check_fingerprint(self, number: int, manifest: Manifest, fingerprint: str) -> None:
        if manifest["run"]["teacher"] != fingerprint:
            raise UserError(
                f"stage {number} was trained by another teacher than {self.trainings[number - 1].teacher.source}; "
                f"{'give that one, or another model directory' if number == 1 else self._advice_on_folder(number)}"
            )

    def _advice(self, number: int) -> str:
        """What helps where a stage is damaged."""
        return _advice_on_product(self.trainings[number - 1].model_dir) or self._advice_on_folder(number)

    def _advice_on_folder(self, number: int) -> str:
        after = " and the stages after it" if number < len(self.trainings) else ""
        folder = self.trainings[number - 1].model_dir
        return f"bring {folder} back as it was, or remove it{after} to run from there again"

    def load_teacher(self, number: int) -> None:
        """Loads the teacher of a stage as its run needs it: the chain's teacher, or the student of the stage before."""
        training = self.trainings[number - 1]
        if number == 1:
            training.load_teacher()
            _, manifest = last_manifest(training.model_dir)
            if manifest:
                self._check_fingerprint(1, manifest, training.teacher.fingerprint)
            return
        try:
            training.load_teacher()
            if _stored_fingerprint(training.teacher.source) not in (None, training.teacher.fingerprint):
                raise UserError(f"the parameters in {training.teacher.source} are not those that were written")
        except UserError as error:
            raise UserError(
                f"the student of stage {number - 1}, which teaches stage {number}, cannot be used: {error}; "
                f"{self._advice(number - 1)}"
            ) from error


def plan_chain(
    model_dir: str, experiment: Experiment, teacher: TrainedModel, interpolation: Interpolation, label: str = ""
) -> Chain:
    """The chain from a teacher to a student, each stage in `<model_dir>/stage_<n>/`; creates and reads nothing.

    Args:
        model_dir: receives the folders of the stages.
        experiment: the distillation straight from teacher to student; see `stages.plan_stages`.
        teacher: opened; assistants are of its type and run like it when they teach.
        interpolation: how many stages, and their overrides.
        label: begins the progress lines.
    """
    stages = plan_stages(experiment, teacher.config, interpolation)
    trainings: list[Training] = []
    for number, stage in enumerate(stages, 1):
        trainings.append(
            Training(
                model_dir=f"{model_dir}/stage_{number}",
                experiment=stage,
                teacher=lazy_model(trainings[-1].model_dir, stage.teacher.config) if trainings else teacher,
                label=", ".join(filter(None, (label, f"stage {number} of {len(stages)}"))),
                may_continue=False,
            )
        )
    return Chain(trainings=tuple(trainings), objective=experiment.objective, keep=interpolation.keep)


def run_chain(
    chain: Chain, evaluation: Callable[[Mesh], Evaluation], *, release_teacher: bool = True
) -> tuple[StageResult, ...]:
    """Runs what is not finished of a chain, in order; the results of all its stages, the student's last.

    Args:
        chain: checked.
        evaluation: gives the evaluation of students on a mesh; called for each stage that is run, and for no other.
        release_teacher: forget the chain's teacher after the first stage; False for one that is needed elsewhere.

    Raises:
        UserError: naming the stage.
        Stopped: a signal stopped the run; progress is saved, and the same command resumes.
    """
    results = []
    for number, ((_, manifest), training) in enumerate(zip(chain.stage_status(), chain.trainings, strict=True), 1):
        if not is_finished(manifest):
            chain.load_teacher(number)
            with naming(f"stage {number}"):
                train(training, evaluation(training.mesh()))
            if number > 1 or release_teacher:
                training.teacher.release()
        with naming(f"stage {number}"):
            if chain.keep == "params" and number < len(chain.trainings):
                keep_params_only(training)
            _, manifest = last_manifest(training.model_dir)
        results.append(
            StageResult(
                **vars(Progress.of(manifest)),
                model_dir=training.model_dir,
                config=training.student,
                metrics=manifest["held_out"],
            )
        )
    return tuple(results)


def keep_params_only(training: Training) -> None:
    """Reduces a finished run's checkpoints to the last step's parameters; resumes where it was interrupted.

    Raises:
        UserError: a checkpoint cannot be read, or the copy differs from it; nothing was removed.
    """
    checkpoints, product = stored_path(training.model_dir) / CHECKPOINTS, f"{training.model_dir}/{PRODUCT}"
    written = bool(finished_steps(f"{product}/{CHECKPOINTS}"))
    has_checkpoints = checkpoints.exists()
    agree("product", {"written": written, "checkpoints": has_checkpoints})
    if not written:
        _write_params_only(training, product)
    if has_checkpoints:
        with naming(product, lambda: _advice_on_product(training.model_dir) or "bring it back as it was"):
            copy = open_model(product)
            copy.load_on(training.mesh())
            if copy.fingerprint != _stored_fingerprint(product):
                raise UserError("it does not read back as it was written")
        agree("compared product", {})
        if jax.process_index() == 0:
            checkpoints.rmtree()
    agree("product alone", {})


def _write_params_only(training: Training, product: str) -> None:
    trained = open_model(training.model_dir)
    params = trained.load_on(training.mesh())
    manifest = trained.manifest | {PRODUCT: {"fingerprint": trained.fingerprint}}
    if jax.process_index() == 0 and training.vocabulary_file() is not None:
        keep_tokenizer(product, training.vocabulary_file())
    largest = math.ceil(max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9)
    with Checkpointer(f"{product}/{CHECKPOINTS}", keep_last=1, concurrent_gigabytes=largest) as checkpointer:
        checkpointer.save(trained.step, {"params": params}, {}, manifest, force=True)


def _advice_on_product(model_dir: str) -> str | None:
    """Advice for a damaged params-only checkpoint; None without one, or without checkpoints to make it from."""
    product = stored_path(model_dir) / PRODUCT
    if not (product.exists() and finished_steps(f"{model_dir}/{CHECKPOINTS}")):
        return None
    return f"remove {product}; the same command then resumes from the checkpoints beside it"


def _stored_fingerprint(model_dir: str) -> str | None:
    """The fingerprint in the manifest of a params-only checkpoint; None if the run still has its checkpoints."""
    return last_manifest(model_dir)[1].get(PRODUCT, {}).get("fingerprint")
