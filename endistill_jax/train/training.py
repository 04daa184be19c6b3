"""A training run before it starts: its settings, and everything that can be checked without starting it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.interchange import VocabularyFile
from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.checkpoints.student_init import RANDOM, StudentInit
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.held_out import check_metric
from endistill_jax.models.family import Params
from endistill_jax.models.t5.config import T5Config
from endistill_jax.multihost.agreement import agree
from endistill_jax.objectives import Path
from endistill_jax.sharding import check_rows, make_mesh, param_shardings
from endistill_jax.storage import check_writable_place
from endistill_jax.train.compiler_options import options_of_platform
from endistill_jax.train.optimizer import OptimizerConfig, make_schedule
from endistill_jax.train.settings import Data, Run

# What of an identity is a fingerprint of another model's parameters.
CONTENTS = ("teacher", "initial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training run, checked but not started.

    Attributes:
        model_dir: where checkpoints, metrics and tables go.
        config: the model that is trained.
        path: what it learns from.
        data: what it reads.
        optimizer: how it is updated.
        run: how long, and what is kept.
        teacher: the frozen model, None if the path needs none.
        student_init: what of the teacher the model starts from.
        initial: a trained model that is trained further; its settings but for dropout and execution are `config`.
        scoring: how held-out examples are scored, as plain values; empty for denoising, which has one way.
        label: a word for progress lines.
    """

    model_dir: str
    config: T5Config
    path: Path
    data: Data
    optimizer: OptimizerConfig
    run: Run
    teacher: TrainedModel | None = None
    student_init: StudentInit = RANDOM
    initial: TrainedModel | None = None
    scoring: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""

    @property
    def teacher_config(self) -> T5Config | None:
        """The teacher's settings, if there is a teacher."""
        return None if self.teacher is None else self.teacher.config

    def check(self) -> None:
        """Finds what would go wrong later, before anything is created.

        Raises:
            UserError: naming the setting and what would be right.
        """
        from endistill_jax.data.pipeline import check_split

        check_writable_place(self.model_dir)
        agree("vocabulary and teacher", self._read_facts())
        check_split(self.task(), "train")
        make_schedule(self.optimizer, self.run.steps)
        self.path.validate(self.config, self.teacher_config)
        self._check_targets()
        if not self.scoring:
            check_metric(self.run.keep_best)
        self.student_init.check(self.teacher_config, self.config)
        self.check_mesh()
        check_vocabularies(self.vocabulary(), self.config, self.teacher)
        if self.initial is not None:
            check_same_vocabulary(self.vocabulary(), self.initial, "the model")

    def _check_targets(self) -> None:
        targets = self.path.interpolated_targets
        if targets is not None and targets.steps > self.run.steps:
            raise UserError(
                f"InterpolatedTargets.steps is {targets.steps}, but the run ends after {self.run.steps} steps "
                "and would never see the teacher's own targets; make it at most that"
            )

    def check_mesh(self) -> None:
        """Finds what the mesh does not divide, or its compiler does not take; reads nothing.

        Raises:
            UserError: naming the setting and what would be right.
        """
        mesh, run = self.mesh(), self.run
        param_shardings(self.config, mesh, whose="the student's" if self.teacher else "the model's")
        if self.teacher is not None:
            param_shardings(self.teacher.config, mesh, run.teacher_placement, "the teacher's")
        check_rows("Data.batch_size", self.data.batch_size, mesh, run.micro_batches)
        check_rows("Data.eval_batch_size", self.data.eval_batch_size, mesh)
        options_of_platform(run.compiler_options, mesh)

    def _read_facts(self) -> dict[str, Any]:
        """What the same settings may mean on another host: files of the same name with other contents."""
        teacher = self.teacher
        return {
            "vocabulary": fingerprint_vocabulary(self.vocabulary()),
            "teacher": teacher and dataclasses.asdict(teacher.config) | {"step": teacher.step},
            "initial": self.initial and {"step": self.initial.step},
        }

    def mesh(self) -> Mesh:
        """The device mesh of the run."""
        return make_mesh(*self.run.mesh, slices=self.run.slices)

    def load_teacher(self) -> Params:
        """The teacher's parameters, where the run wants them."""
        return self.teacher.load_on(self.mesh(), self.run.teacher_placement)

    def load_initial(self) -> Params:
        """The parameters that are trained further, on the mesh."""
        return self.initial.load_on(self.mesh())

    def task(self) -> Any:
        """The SeqIO task or mixture that `data.task` names or is."""
        from endistill_jax.data.registry import resolve_task

        return resolve_task(self.data.task)

    def vocabulary(self) -> Any:
        """The vocabulary of the task."""
        return self.task().output_features["targets"].vocabulary

    def vocabulary_file(self) -> VocabularyFile | None:
        """The SentencePiece model of the task; None if its vocabulary is another kind."""
        vocabulary = self.vocabulary()
        path = getattr(vocabulary, "sentencepiece_model_file", None)
        return None if path is None else VocabularyFile(path, vocabulary.extra_ids)

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption; reads the teacher, if that was not done."""
        identity = self.settings() | {"teacher": None if self.teacher is None else self.teacher.fingerprint}
        return identity if self.initial is None else identity | {"initial": self.initial.fingerprint}

    def settings(self) -> dict[str, Any]:
        """The identity but for what other models contain: for this none of them is read."""
        return {
            "model": self.config.architecture()
            | {"dtype": self.config.dtype, "dropout_rate": self.config.dropout_rate},
            "teacher_dtype": None if self.teacher is None else self.teacher.config.dtype,
            "path": dataclasses.asdict(self.path),
            "optimizer": dataclasses.asdict(self.optimizer),
            "task": self.task().name,
            "data": {
                name: getattr(self.data, name)
                for name in ("inputs_length", "targets_length", "batch_size", "pack", "shards")
            },
            "steps": self.run.steps,
            "seed": self.run.seed,
            "micro_batches": self.run.micro_batches,
            "vocabulary": fingerprint_vocabulary(self.vocabulary()),
            "student_init": self.student_init.facts(self.teacher_config, self.config),
            # What decides the figures, and by them which step is the best and when to end.
            "evaluation": self.data.evaluated | self.scoring | self.run.chosen_by,
        }


def check_vocabularies(vocabulary: Any, config: T5Config, teacher: TrainedModel | None) -> None:
    """Teacher, student and task must speak the same vocabulary: equal in content, not only in size.

    Raises:
        UserError: if they do not, or the model has fewer rows than the vocabulary has ids.
    """
    if vocabulary.vocab_size > config.vocab_size:
        raise UserError(
            f"T5Config.vocab_size is {config.vocab_size}, but the task's vocabulary has {vocabulary.vocab_size} ids; "
            f"make it at least that"
        )
    if teacher is not None:
        check_same_vocabulary(vocabulary, teacher, "the teacher")


def check_same_vocabulary(vocabulary: Any, model: TrainedModel, role: str) -> None:
    """A trained model must speak the task's vocabulary.

    Raises:
        UserError: if it is known to have been trained with another.
    """
    if model.has_other_vocabulary(vocabulary):
        raise UserError(
            f"{role} {model.source} was trained with another vocabulary than the task's; "
            f"choose a task with {role}'s vocabulary"
        )
