"""A training before it starts: an experiment in a folder, its other models opened, everything checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.manager import read_manifest
from endistill_jax.checkpoints.manifest import Manifest, check_same, plain
from endistill_jax.checkpoints.models import TrainedModel, find_run, open_model, print_notes
from endistill_jax.checkpoints.tokenizer import VocabularyFile
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.denoising import check_metric
from endistill_jax.models.family import (
    ModelConfig,
    Params,
    abstract_params,
    check_batches,
    config_from_plain,
    count_params,
)
from endistill_jax.multihost import agree
from endistill_jax.objectives import Objective
from endistill_jax.reports.table import format_count
from endistill_jax.sharding import check_rows, param_shardings
from endistill_jax.storage import check_writable_place
from endistill_jax.train.experiment import Data, Experiment, Run, Teacher
from endistill_jax.train.optimizer import make_schedule
from endistill_jax.train.progress import Progress
from endistill_jax.train.step import options_of_platform

# What of an identity is a fingerprint of another model's parameters.
CONTENTS = ("teacher", "initial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """An experiment in a folder, its other models opened; not started.

    Attributes:
        model_dir: where checkpoints, metrics and tables go.
        initial: a trained model that is trained further; its settings but for dropout and execution are the student's.
        scoring: how held-out examples are scored, as plain values; empty for denoising, which has one way.
        label: a word for progress lines.
        may_continue: whether a finished run may be given more steps; not one that is compared with others, or whose
            result is already another's teacher.
    """

    model_dir: str
    experiment: Experiment
    teacher: TrainedModel | None = None
    initial: TrainedModel | None = None
    scoring: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    may_continue: bool = True

    @property
    def student(self) -> ModelConfig:
        return self.experiment.student

    @property
    def objective(self) -> Objective:
        return self.experiment.objective

    @property
    def data(self) -> Data:
        return self.experiment.data

    @property
    def run(self) -> Run:
        return self.experiment.run

    @property
    def teacher_config(self) -> ModelConfig | None:
        return None if self.teacher is None else self.teacher.config

    def check(self) -> None:
        """Finds what would go wrong later, before anything is created."""
        from endistill_jax.data.text_pipeline import check_split

        experiment = self.experiment
        if (experiment.initial_checkpoint is None) != (self.initial is None):
            raise UserError(
                f"Experiment.initial_checkpoint is {experiment.initial_checkpoint!r}, but this job starts its models "
                "itself; leave it None, or train with jobs.distill"
            )
        check_writable_place(self.model_dir)
        agree("vocabulary and teacher", self._identity_of_files())
        check_split(self.task(), "train")
        make_schedule(experiment.optimizer, self.run.steps)
        self.objective.validate(self.student, self.teacher_config)
        targets = self.objective.interpolated_targets
        if targets is not None and targets.steps > self.run.steps:
            raise UserError(
                f"InterpolatedTargets.steps is {targets.steps}, but the run ends after {self.run.steps} steps "
                "and would never see the teacher's own targets; make it at most that"
            )
        if not self.scoring and self.student.depth("decoder"):
            check_metric(self.run.keep_best)
        experiment.init.check(self.teacher_config, self.student)
        self.check_mesh()
        check_vocabularies(self.vocabulary(), self.student, self.teacher)
        check_batches(self.student, self.vocabulary().eos_id)
        if self.initial is not None:
            check_same_vocabulary(self.vocabulary(), self.initial, "the model")
            check_shape(self.initial.source, self.initial.config, self.student, "the student")

    def check_mesh(self) -> None:
        """Finds what the mesh does not divide, or its compiler does not take; reads nothing."""
        mesh, run = self.mesh(), self.run
        param_shardings(self.student, mesh, whose="the student's" if self.teacher else "the model's")
        if self.teacher is not None:
            param_shardings(self.teacher.config, mesh, self.experiment.teacher_sharding, "the teacher's")
        check_rows("Data.batch_size", self.data.batch_size, mesh, run.micro_batches)
        check_rows("Data.eval_batch_size", self.data.eval_batch_size, mesh)
        options_of_platform(run.compiler_options, mesh)

    def _identity_of_files(self) -> dict[str, Any]:
        """What the same settings may mean on another host: files of the same name with other contents."""
        teacher = self.teacher
        return {
            "vocabulary": fingerprint_vocabulary(self.vocabulary()),
            "teacher": teacher and plain(teacher.config) | {"step": teacher.step},
            "initial": self.initial and {"step": self.initial.step},
        }

    def mesh(self) -> Mesh:
        return self.run.mesh_of_devices()

    def load_teacher(self) -> Params:
        """The teacher's parameters, sharded as the experiment says."""
        return self.teacher.load_on(self.mesh(), self.experiment.teacher_sharding)

    def load_initial(self) -> Params:
        """The parameters that are trained further, on the mesh."""
        return self.initial.load_on(self.mesh())

    def task(self) -> Any:
        """The SeqIO task or mixture that `data.task` names or is."""
        from endistill_jax.data.text_pipeline import resolve_task

        return resolve_task(self.data.task)

    def vocabulary(self) -> Any:
        """The vocabulary of the task."""
        return self.task().output_features["targets"].vocabulary

    def vocabulary_file(self) -> VocabularyFile | None:
        """The SentencePiece model of the task; None if its vocabulary is another kind."""
        vocabulary = self.vocabulary()
        path = getattr(vocabulary, "sentencepiece_model_file", None)
        return None if path is None else VocabularyFile(path, vocabulary.extra_ids)

    def with_shards(self, manifest: Manifest | None) -> "Training":
        """The same with the number of data shards resolved: as set, as the run started with, or one for each host."""
        from endistill_jax.sharding import host_part

        saved = (manifest or {}).get("run", {}).get("data", {})
        shards = self.data.shards or saved.get("shards") or host_part(self.mesh()).count
        data = dataclasses.replace(self.data, shards=shards)
        return dataclasses.replace(self, experiment=dataclasses.replace(self.experiment, data=data))

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption; reads the other models' parameters."""
        identity = self.settings() | {"teacher": None if self.teacher is None else self.teacher.fingerprint}
        return identity if self.initial is None else identity | {"initial": self.initial.fingerprint}

    def settings(self) -> dict[str, Any]:
        """The identity without the contents of other models, so none is read. Values may be dataclasses."""
        experiment, run, data, student = self.experiment, self.run, self.data, self.student
        read = ("inputs_length", "targets_length", "batch_size", "pack", "shards")
        return {
            "model": student.architecture() | {"dtype": student.dtype, "dropout_rate": student.dropout_rate},
            "teacher_dtype": None if self.teacher is None else self.teacher.config.dtype,
            "objective": self.objective.described(),
            "optimizer": experiment.optimizer,
            "task": self.task().name,
            "data": {name: getattr(data, name) for name in read},
            "steps": run.steps,
            "seed": run.seed,
            "micro_batches": run.micro_batches,
            "vocabulary": fingerprint_vocabulary(self.vocabulary()),
            "student_init": experiment.init.facts(self.teacher_config, student),
            # Decides the metrics, and by them which step is the best and when to end.
            "evaluation": data.evaluated | dict(self.scoring) | run.chosen_by,
        }

    def check_resumes(self, step: int, manifest: Manifest, *, contents: bool = True) -> None:
        """Refuses a checkpoint of another training, naming every difference.

        Args:
            step: of the checkpoint.
            manifest: of the checkpoint.
            contents: compare the parameters of teacher and initial model too; reads them.
        """
        training, saved = self.with_shards(manifest), manifest["run"]
        current = training.identity() if contents else training.settings()
        ignored = () if contents else CONTENTS
        if self.is_continued(manifest):
            ignored += ("steps",)
        saved = {name: value for name, value in saved.items() if name not in ignored}
        current = {name: value for name, value in current.items() if name not in ignored}
        check_same(saved, current, f"the checkpoint of step {step} in {self.model_dir}")

    def check_saved(self) -> None:
        """As `check_resumes` with the last checkpoint in its folder, if there is one; reads no parameters."""
        step, manifest = last_manifest(self.model_dir)
        if manifest:
            self.check_resumes(step, manifest, contents=False)

    def is_continued(self, manifest: Manifest) -> bool:
        """Whether the manifest is of a finished run, and this one is longer."""
        return self.may_continue and is_finished(manifest) and self.run.steps > manifest["run"]["steps"]


def open_training(model_dir: str, experiment: Experiment, **settings: Any) -> Training:
    """A training whose teacher and initial checkpoint are opened; reads no parameters."""
    teacher, initial, scan_layers = None, None, experiment.student.scan_layers
    if experiment.teacher is not None:
        teacher = open_teacher(experiment.teacher, scan_layers)
    if experiment.initial_checkpoint is not None:
        initial = open_model(experiment.initial_checkpoint, scan_layers=scan_layers)
        print_notes(initial)
    return Training(model_dir=model_dir, experiment=experiment, teacher=teacher, initial=initial, **settings)


def open_teacher(teacher: Teacher, scan_layers: bool) -> TrainedModel:
    """Opens a teacher; its layers run in a compiled loop (`scan_layers`) if the student's do."""
    opened = open_model(teacher.source, teacher.dtype, scan_layers)
    print_notes(opened)
    if teacher.config is not None:
        check_shape(teacher.source, opened.config, teacher.config, "the teacher")
    return opened


def as_teacher(shape: ModelConfig, dtype: str, scan_layers: bool) -> ModelConfig:
    """A teacher's settings from its shape alone, as `open_model` gives them."""
    return config_from_plain(shape.architecture() | {"dtype": dtype, "scan_layers": scan_layers})


def check_shape(source: str, found: ModelConfig, expected: ModelConfig, role: str) -> None:
    """Refuses a checkpoint of another shape than the settings say."""
    said, has = expected.architecture(), found.architecture()
    differing = [
        f"{name} {has.get(name)} instead of {said.get(name)}"
        for name in sorted(said.keys() | has.keys())
        if has.get(name) != said.get(name)
    ]
    if differing:
        raise UserError(
            f"the checkpoint {source} is not what {role}'s settings say: {', '.join(differing)}; correct one"
        )


def check_vocabularies(vocabulary: Any, config: ModelConfig, teacher: TrainedModel | None) -> None:
    """Teacher, student and task must have the same vocabulary: equal in content, not only in size."""
    if vocabulary.vocab_size > config.vocab_size:
        raise UserError(
            f"the model's vocab_size is {config.vocab_size}, but the task's vocabulary has {vocabulary.vocab_size} "
            "ids; make it at least that"
        )
    if teacher is not None:
        check_same_vocabulary(vocabulary, teacher, "the teacher")


def check_same_vocabulary(vocabulary: Any, model: TrainedModel, role: str) -> None:
    """Refuses a model that is known to have been trained with another vocabulary than the task's."""
    if model.has_other_vocabulary(vocabulary):
        raise UserError(
            f"{role} {model.source} was trained with another vocabulary than the task's; "
            f"choose a task with {role}'s vocabulary"
        )


def last_manifest(model_dir: str) -> tuple[int, Manifest]:
    """The last step that a run saved, and its manifest; 0 and nothing where there is none."""
    found = find_run(model_dir)
    return (0, {}) if found is None else (found[1], read_manifest(str(found[0]), found[1]))


def is_finished(manifest: Manifest) -> bool:
    """Whether a run's last manifest, empty where there is none, is that of a finished run."""
    return bool(manifest.get("progress", {}).get("finished"))


def finished(training: Training) -> Progress | None:
    """Totals of a finished run from its manifest alone; None if it is unfinished, or is to be continued."""
    step, manifest = last_manifest(training.model_dir)
    if not is_finished(manifest) or training.is_continued(manifest):
        return None
    training.check_resumes(step, manifest)
    return Progress.of(manifest)


def describe(training: Training) -> str:
    """What `--dry_run` prints: a setting a line, then a parameter with its shape a line."""
    lines = [f"model_dir: {training.model_dir}", f"mesh: {dict(training.mesh().shape)}"]
    if training.teacher is not None:
        lines.append(f"teacher: {training.teacher.source}, {_size(training.teacher.config)}")
        lines.append(f"  {training.teacher.config}")
    if training.initial is not None:
        lines.append(f"starts from: {training.initial.source}, step {training.initial.step}")
    lines.append(f"student: {_size(training.student)}" if training.teacher else f"model: {_size(training.student)}")
    lines.append(f"  {training.student}")
    if training.teacher is not None:
        lines.append(f"init: {training.experiment.init.facts(training.teacher.config, training.student)}")
    lines.append(f"task: {training.task().name}")
    lines += [f"objective: {term}" for term in training.objective.terms]
    for name in ("data", "optimizer", "run"):
        settings = getattr(training.experiment, name)
        shown = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        shown.pop("task", None)
        lines.append(f"{name}: {shown}")
    tokens = training.data.batch_size * (training.data.inputs_length + training.data.targets_length)
    lines.append(f"tokens: at most {format_count(tokens)} a step, {format_count(tokens * training.run.steps)} in all")
    lines.append("parameters:")
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(training.student)):
        lines.append(f"  {'/'.join(entry.key for entry in path)} {list(leaf.shape)}")
    return "\n".join(lines)


def _size(config: ModelConfig) -> str:
    return f"{format_count(count_params(abstract_params(config)))} parameters"
