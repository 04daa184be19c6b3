"""A chain of distillations in one model directory: planned, checked, run stage by stage, and gone on with.

Each stage is an ordinary run in a folder `stage_<n>` of the model directory; the last one's product is the chain's.
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
from endistill_jax.interpolation.stages import Interpolation, Stage, plan_stages, stages_table
from endistill_jax.models.family import ModelConfig
from endistill_jax.multihost import agree
from endistill_jax.objectives import Objective
from endistill_jax.storage import stored_path
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.progress import Best, Progress
from endistill_jax.train.run import train
from endistill_jax.train.training import Training, is_finished, last_manifest


def keep_product(training: Training) -> None:
    """Reduces a finished run's checkpoints to the last step's parameters; resumes where it was interrupted.

    Raises:
        UserError: a checkpoint cannot be read, or the copy differs from it; nothing was removed.
    """
    checkpoints = stored_path(training.model_dir) / CHECKPOINTS
    written = bool(finished_steps(f"{_folder(training.model_dir)}/{CHECKPOINTS}"))
    has_checkpoints = checkpoints.exists()
    agree("product", {"written": written, "checkpoints": has_checkpoints})
    if not written:
        _write(training)
    if has_checkpoints:
        _compare(training)
        agree("compared product", {})
        if jax.process_index() == 0:
            checkpoints.rmtree()
    agree("product alone", {})


def remedy(model_dir: str) -> str | None:
    """Advice for a damaged product; None if there is none, or no checkpoint next to it."""
    product = stored_path(_folder(model_dir))
    if not (product.exists() and finished_steps(f"{model_dir}/{CHECKPOINTS}")):
        return None
    return f"remove {product}; the same command then goes on from the checkpoints beside it"


def product_fingerprint(model_dir: str) -> str | None:
    """The fingerprint of a run's product, from its manifest; None if the run still has its checkpoints."""
    return last_manifest(model_dir)[1].get(PRODUCT, {}).get("fingerprint")


def check_not_damaged(model_dir: str) -> None:
    """Refuses to start from scratch because a product is incomplete.

    Raises:
        UserError: the folder has parts of a product, and no checkpoint to make it from.
    """
    product = stored_path(model_dir) / PRODUCT
    if product.exists() and not last_manifest(model_dir)[1]:
        raise UserError(f"{product} is not whole")


def _folder(model_dir: str) -> str:
    return f"{model_dir}/{PRODUCT}"


def _write(training: Training) -> None:
    folder = _folder(training.model_dir)
    trained = open_model(training.model_dir)
    params = trained.load_on(training.mesh())
    manifest = trained.manifest | {PRODUCT: {"fingerprint": trained.fingerprint}}
    if jax.process_index() == 0 and training.vocabulary_file() is not None:
        keep_tokenizer(folder, training.vocabulary_file())
    largest = math.ceil(max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9)
    with Checkpointer(f"{folder}/{CHECKPOINTS}", keep_last=1, concurrent_gigabytes=largest) as checkpointer:
        checkpointer.save(trained.step, {"params": params}, {}, manifest, force=True)


def _compare(training: Training) -> None:
    """Reads a product and compares it with the fingerprint in its manifest."""
    folder = _folder(training.model_dir)
    try:
        product = open_model(folder)
        product.load_on(training.mesh())
        if product.fingerprint != product_fingerprint(folder):
            raise UserError(f"{folder} does not read back as it was written")
    except UserError as error:
        advice = remedy(training.model_dir) or "bring it back as it was"
        raise UserError(f"{error}; {advice}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage ended with, now or when it was run earlier.

    Attributes:
        model_dir: a model directory: of `open_model`, `export` and every other job.
        config: its student.
        metrics: of the last evaluation, by name.
        best: the best evaluation by the metric of `Run.keep_best`; without one, the last.
        tokens: real tokens read, inputs and targets.
        seconds: spent in training steps, over all attempts.
    """

    model_dir: str
    config: ModelConfig
    metrics: Mapping[str, float]
    best: Best
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages that were planned and not started.

    Attributes:
        stages: their settings, in order.
        trainings: each as an ordinary run in its folder; the teacher of all but the first is read once it is there.
        objective: of the direct distillation that they are compared with.
        keep: see `Interpolation.keep`.
    """

    stages: tuple[Stage, ...]
    trainings: tuple[Training, ...]
    objective: Objective
    keep: str = "params"

    def check(self) -> None:
        """Finds what would go wrong later, in any stage, before anything is created; reads no example.

        Raises:
            UserError: naming the stage, the setting or the damage, and what would be right.
        """
        for number, training in enumerate(self.trainings, 1):
            with naming(f"stage {number}"):
                training.check()
        self.stage_status()

    def describe(self) -> str:
        """The table of the stages: shape, parameters, ratio, operations, steps, and where each stands."""
        states = []
        for step, manifest in self.stage_status():
            states.append("finished" if is_finished(manifest) else f"at step {step}" if manifest else "")
        return stages_table(self.stages, self.objective, states)

    def stage_status(self) -> list[tuple[int, Manifest]]:
        """Of every stage the last step that is saved, and its manifest; 0 and nothing where there is none.

        Raises:
            UserError: for what was made with other settings, by another teacher, or is not whole.
        """
        found: list[tuple[int, Manifest]] = []
        for number, training in enumerate(self.trainings, 1):
            with naming(f"stage {number}", functools.partial(self._advice_on_product, number)):
                check_not_damaged(training.model_dir)
                step, manifest = last_manifest(training.model_dir)
            if manifest:
                if found and not is_finished(found[-1][1]):
                    raise UserError(
                        f"stage {number} was begun in {training.model_dir}, but stage {number - 1}, its teacher, is "
                        f"not there as a whole; {self._advice(number - 1)}"
                    )
                with naming(f"stage {number}"):
                    training.check_resumes(step, manifest, contents=False)
                if is_finished(manifest) or number == 1:
                    self._check_teacher(number, manifest)
            found.append((step, manifest))
        agree("stages", {str(number): step for number, (step, _) in enumerate(found, 1)})
        return found

    def _check_teacher(self, number: int, manifest: Manifest) -> None:
        """A stage had the teacher of this chain: by content, which is read only where nothing else tells."""
        teacher = self.trainings[number - 1].teacher
        known = product_fingerprint(teacher.source) if number > 1 else None
        if known is None and manifest["teacher"]["source"] == teacher.source:
            return
        self._check_content(number, manifest, known or teacher.fingerprint)

    def _check_content(self, number: int, manifest: Manifest, fingerprint: str) -> None:
        if manifest["run"]["teacher"] != fingerprint:
            raise UserError(
                f"stage {number} was trained by another teacher than {self.trainings[number - 1].teacher.source}; "
                f"{'give that one, or another model directory' if number == 1 else self._advice(number)}"
            )

    def _advice(self, number: int) -> str:
        after = " and the stages after it" if number < len(self.trainings) else ""
        folder = self.trainings[number - 1].model_dir
        return f"bring {folder} back as it was, or remove it{after} to run from there again"

    def _advice_on_product(self, number: int) -> str:
        return remedy(self.trainings[number - 1].model_dir) or self._advice(number)

    def load_teacher(self, number: int) -> None:
        """Reads the teacher of a stage to where its run wants it: the chain's, or the product of the stage before.

        Raises:
            UserError: naming the stage whose product cannot be read, or is not what it was, or that was begun with
                another teacher.
        """
        training = self.trainings[number - 1]
        if number == 1:
            training.load_teacher()
            _, manifest = last_manifest(training.model_dir)
            if manifest:
                self._check_content(1, manifest, training.teacher.fingerprint)
            return
        try:
            training.load_teacher()
            known = product_fingerprint(training.teacher.source)
            if known is not None and training.teacher.fingerprint != known:
                raise UserError(f"the parameters in {training.teacher.source} are not those that were written")
        except UserError as error:
            raise UserError(
                f"the product of stage {number - 1}, which teaches stage {number}, cannot be used: {error}; "
                f"{self._advice_on_product(number - 1)}"
            ) from error


def plan_chain(
    model_dir: str, experiment: Experiment, teacher: TrainedModel, interpolation: Interpolation, label: str = ""
) -> Chain:
    """The chain from a teacher to a student, each stage in `<model_dir>/stage_<n>/`; creates and reads nothing.

    Args:
        model_dir: receives the folders of the stages.
        experiment: the distillation straight from teacher to student; see `stages.plan_stages`.
        teacher: opened; assistants are of its type and run like it when they teach.
        interpolation: how many stages, and what each does in its own way.
        label: begins the progress lines.

    Raises:
        UserError: no such assistants, or settings of a stage that does not exist.
    """
    stages = plan_stages(experiment, teacher.config, interpolation)
    trainings: list[Training] = []
    for stage in stages:
        trainings.append(
            Training(
                model_dir=f"{model_dir}/stage_{stage.number}",
                experiment=stage.experiment,
                teacher=lazy_model(trainings[-1].model_dir, stage.teacher) if trainings else teacher,
                label=", ".join(filter(None, (label, f"stage {stage.number} of {len(stages)}"))),
                may_continue=False,
            )
        )
    return Chain(stages=stages, trainings=tuple(trainings), objective=experiment.objective, keep=interpolation.keep)


def run_chain(
    chain: Chain, evaluation: Callable[[Mesh], Evaluation], *, release_teacher: bool = True
) -> tuple[StageResult, ...]:
    """Runs what is not finished of a chain, in order; the results of all its stages, the student's last.

    Args:
        chain: checked.
        evaluation: gives what judges the students on a mesh; asked for each stage that is run, and for no other.
        release_teacher: forget the chain's teacher after the first stage; False for one that is needed elsewhere.

    Raises:
        UserError: naming the stage.
        Stopped: when a signal asked the run to stop; what was done is saved, and the same command goes on.
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
                keep_product(training)
            _, manifest = last_manifest(training.model_dir)
        found = Progress.of(manifest)
        results.append(
            StageResult(
                model_dir=training.model_dir,
                config=training.student,
                metrics=manifest["held_out"],
                best=found.best,
                tokens=found.tokens,
                seconds=found.seconds,
            )
        )
    return tuple(results)
