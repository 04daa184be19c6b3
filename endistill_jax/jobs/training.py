"""A training run before it starts: its settings, and everything that can be checked without starting it."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from endistill_jax.checkpoints.fingerprint import fingerprint_vocabulary
from endistill_jax.checkpoints.interchange import VocabularyFile
from endistill_jax.checkpoints.student_init import RANDOM, StudentInit
from endistill_jax.errors import UserError
from endistill_jax.jobs.models import TrainedModel
from endistill_jax.jobs.settings import Data, Run
from endistill_jax.losses import Path
from endistill_jax.model.config import T5Config
from endistill_jax.sharding import make_mesh, param_shardings
from endistill_jax.train.optimizer import OptimizerConfig, make_schedule


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
        make_schedule(self.optimizer, self.run.steps)
        self.path.validate(self.config, self.teacher_config)
        self.student_init.check(self.teacher_config, self.config)
        mesh = self.mesh()
        for config in (self.config, *([] if self.teacher is None else [self.teacher.config])):
            param_shardings(config, mesh)
        spread = mesh.shape["data"] * mesh.shape["fsdp"]
        for name, parts in (("batch_size", spread * self.run.micro_batches), ("eval_batch_size", spread)):
            if getattr(self.data, name) % parts:
                raise UserError(
                    f"Data.{name} is {getattr(self.data, name)}; it must be a multiple of {parts} "
                    "(data x fsdp, times micro_batches in training)"
                )
        check_vocabularies(self.vocabulary(), self.config, self.teacher)

    def mesh(self) -> Mesh:
        """The device mesh of the run."""
        return make_mesh(*self.run.mesh)

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
        """What must not change between a checkpoint and its resumption."""
        return {
            "model": self.config.architecture()
            | {"dtype": self.config.dtype, "dropout_rate": self.config.dropout_rate},
            "path": dataclasses.asdict(self.path),
            "optimizer": dataclasses.asdict(self.optimizer),
            "task": self.task().name,
            "data": {
                name: getattr(self.data, name) for name in ("inputs_length", "targets_length", "batch_size", "pack")
            },
            "steps": self.run.steps,
            "seed": self.run.seed,
            "micro_batches": self.run.micro_batches,
            "vocabulary": fingerprint_vocabulary(self.vocabulary()),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
            "student_init": self.student_init.facts(self.teacher_config, self.config),
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
    if teacher is None:
        return
    if teacher.has_other_vocabulary(vocabulary):
        raise UserError(
            f"the teacher {teacher.source} was trained with another vocabulary than the task's; "
            "choose a task with the teacher's vocabulary"
        )
