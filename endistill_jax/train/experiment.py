"""An experiment, as plain data: what is trained, on what, how long.

Stages of a chain, arms of a study, plans, sweeps and fine-tunings are experiments too, derived from one another with
`dataclasses.replace`.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import Any

from jax.sharding import Mesh

from endistill_jax.checkpoints.student_init import RANDOM, StudentInit
from endistill_jax.core.errors import DTYPES, UserError, as_tuple, is_whole, require_at_least, require_choice
from endistill_jax.core.model_io import Lengths
from endistill_jax.models.family import ModelConfig
from endistill_jax.objectives import LossImplementation, Objective
from endistill_jax.sharding import PARAM_SHARDINGS, make_mesh
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.progress import MODES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run.

    Attributes:
        task: name of a registered SeqIO task or mixture, or the task itself. Its "inputs" and "targets" features must
            share a vocabulary.
        inputs_length: encoder length of a row, in tokens.
        targets_length: decoder length of a row.
        batch_size: rows of a global batch, over all hosts and micro-batches.
        pack: pack several examples into one row.
        shards: of the training text, each read independently for its rows of every batch: the same shards give the
            same batches on any number of hosts. None uses the number of hosts at the start of the run, and keeps it.
        eval_split: split of the held-out examples.
        eval_batch_size: rows of an evaluation batch.
        eval_batches: limit on the batches evaluated; None evaluates the whole split.
    """

    task: Any
    inputs_length: int = 512
    targets_length: int = 114
    batch_size: int = 128
    pack: bool = True
    shards: int | None = None
    eval_split: str = "validation"
    eval_batch_size: int = 32
    eval_batches: int | None = None

    def __post_init__(self):
        shards = () if self.shards is None else ("shards",)
        require_at_least(self, 1, "inputs_length", "targets_length", "batch_size", "eval_batch_size", *shards)
        if self.shards and self.batch_size % self.shards:
            raise UserError(f"Data.shards is {self.shards}; it must be a divisor of batch_size ({self.batch_size})")

    @property
    def feature_lengths(self) -> dict[str, int]:
        """Lengths by SeqIO's feature names."""
        return {"inputs": self.inputs_length, "targets": self.targets_length}

    @property
    def lengths(self) -> Lengths:
        """Size of a batch."""
        return Lengths(self.batch_size, self.inputs_length, self.targets_length)

    @property
    def eval_examples(self) -> int | None:
        """Limit on the examples evaluated; None evaluates the whole split."""
        return None if self.eval_batches is None else self.eval_batches * self.eval_batch_size

    @property
    def evaluated(self) -> dict[str, Any]:
        """Which examples of the task are evaluated, as plain values; independent of the batch size."""
        return {name: getattr(self, name) for name in ("eval_split", "eval_examples")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Length, devices, logging and checkpointing of a run.

    Attributes:
        steps: optimizer updates.
        seed: of initial parameters, data order, corruption and dropout.
        micro_batches: number of gradient accumulation steps.
        mesh: sizes of the axes data, fsdp and tensor; -1 is inferred from the number of devices.
        slices: groups of devices with a slow network between them, over which the axis data is sharded; None detects
            TPU slices, and treats other devices as one.
        compiler_options: options of the XLA compiler for the training step, by platform: {"tpu": {"xla_...": value}}.
            Those of platforms other than the run's are ignored.
        log_every: steps between two lines of metrics.
        eval_every: steps between two held-out evaluations; 0 evaluates at the end only.
        eval_at_start: evaluate before the first step too.
        checkpoint_every: steps between two checkpoints; the last step is always saved.
        keep_last: number of latest checkpoints kept.
        keep_best: name of a held-out metric, such as "token_loss", whose best checkpoint is kept too.
        best_mode: "min" or "max", whichever is better for `keep_best`.
        patience: early stopping: the run ends after so many evaluations in a row without improvement of
            `keep_best`; None never ends it early.
        tensorboard: write TensorBoard scalars in addition to metrics.jsonl.
        losses: implementation of the losses; by default chosen by platform and shape.
    """

    steps: int
    seed: int = 0
    micro_batches: int = 1
    mesh: tuple[int, int, int] = (-1, 1, 1)
    slices: int | None = None
    compiler_options: dict[str, dict[str, Any]] | None = None
    log_every: int = 50
    eval_every: int = 0
    eval_at_start: bool = False
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_best: str | None = None
    best_mode: str = "min"
    patience: int | None = None
    tensorboard: bool = True
    losses: LossImplementation = LossImplementation()

    def __post_init__(self):
        axes = "the sizes of its three axes (data, fsdp, tensor), such as (-1, 1, 1)"
        object.__setattr__(self, "mesh", as_tuple(self.mesh, "Run.mesh", axes, functools.partial(is_whole, least=-1)))
        if len(self.mesh) != 3:
            raise UserError(f"Run.mesh is {self.mesh}; give {axes}")
        require_at_least(self, 1, "steps", "micro_batches", "log_every", "checkpoint_every", "keep_last")
        require_choice(self, best_mode=MODES)
        if self.patience is not None:
            require_at_least(self, 1, "patience")
            if not (self.keep_best and self.eval_every):
                raise UserError("Run.patience waits for a better keep_best at every eval_every steps; set both")
        for name in ("checkpoint_every", "eval_every"):
            if getattr(self, name) % self.log_every:
                raise UserError(
                    f"Run.{name} is {getattr(self, name)}; it must be a multiple of log_every ({self.log_every}), "
                    "so that a resumed run logs the same windows of steps"
                )

    @property
    def chosen_by(self) -> dict[str, Any]:
        """The settings that determine which step is best, as plain values."""
        names = ("keep_best", "best_mode", "patience", "eval_every") if self.keep_best else ("keep_best",)
        return {name: getattr(self, name) for name in names}

    def mesh_of_devices(self) -> Mesh:
        """The mesh over all devices."""
        return make_mesh(*self.mesh, slices=self.slices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen teacher.

    Attributes:
        source: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run.
        dtype: float32 or bfloat16, of parameters and computations.
        config: its shape, for planning without a checkpoint; a checkpoint of another shape is refused.
        sharding: "sharded" shards its parameters like the student's; "replicated" shards them over the axis tensor
            only, which avoids gathering them and is faster if they fit.
    """

    source: str
    dtype: str = "bfloat16"
    config: ModelConfig | None = None
    sharding: str = "sharded"

    def __post_init__(self):
        require_choice(self, dtype=DTYPES, sharding=PARAM_SHARDINGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete training setup, except for the output folder.

    Attributes:
        objective: see `objectives.presets`.
        data: the vocabulary must be the teacher's.
        teacher: None if no term of the objective uses one and the student is not initialized from one.
        init: how the student is initialized from the teacher.
        initial_checkpoint: a trained model to continue training, named like a teacher: its parameters are loaded, the
            optimizer and the data start from scratch.
    """

    student: ModelConfig
    objective: Objective
    data: Data
    optimizer: OptimizerConfig
    run: Run
    teacher: Teacher | None = None
    init: StudentInit = RANDOM
    initial_checkpoint: str | None = None

    def __post_init__(self):
        if self.initial_checkpoint is not None and self.init.kind != "random":
            raise UserError(
                f"Experiment has both initial_checkpoint and init of kind {self.init.kind!r}; "
                "a student starts from one of them"
            )

    @property
    def teacher_sharding(self) -> str:
        """How the teacher's parameters are sharded."""
        return "sharded" if self.teacher is None else self.teacher.sharding


def check_folder_names(names: Iterable[str], where: str, taken: Collection[str] = ()) -> None:
    """Checks that names are valid and unreserved as folders of a run."""
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{where} has {name!r}; a name becomes a folder: letters, digits, - and _")
        if name in taken:
            raise UserError(f"{where} has {name!r}, which is a folder of every run; take another name")
