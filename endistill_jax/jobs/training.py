"""What every job that trains does: check, open or resume the model directory, train, evaluate, save."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from endistill_jax.checkpoints.fingerprint import check_facts, fingerprint_vocabulary
from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.errors import Stopped, UserError
from endistill_jax.evaluation.denoising import DenoisingReport
from endistill_jax.jobs.held_out import HeldOut
from endistill_jax.jobs.models import CHECKPOINTS, TrainedModel
from endistill_jax.jobs.settings import Data, Run
from endistill_jax.losses import Path
from endistill_jax.model.config import T5Config
from endistill_jax.reports.run_files import write_run_files
from endistill_jax.sharding import make_mesh, param_shardings, place_batch
from endistill_jax.train.loop import train_loop
from endistill_jax.train.metrics import MetricWriter, Progress
from endistill_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step
from endistill_jax.train.stopping import StopSignal


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
        label: a word for progress lines.
    """

    model_dir: str
    config: T5Config
    path: Path
    data: Data
    optimizer: OptimizerConfig
    run: Run
    teacher: TrainedModel | None = None
    label: str = ""

    def check(self) -> None:
        """Finds what would go wrong later, before anything is created.

        Raises:
            UserError: naming the setting and what would be right.
        """
        make_schedule(self.optimizer, self.run.steps)
        self.path.validate(self.config, None if self.teacher is None else self.teacher.config)
        mesh = self.mesh()
        param_shardings(self.config, mesh)
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

    def vocabulary(self) -> Any:
        """The vocabulary of the task."""
        from endistill_jax.data.registry import resolve_task

        features = resolve_task(self.data.task).output_features
        return features["targets"].vocabulary

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        from endistill_jax.data.registry import resolve_task

        return {
            "model": self.config.architecture()
            | {"dtype": self.config.dtype, "dropout_rate": self.config.dropout_rate},
            "path": dataclasses.asdict(self.path),
            "optimizer": dataclasses.asdict(self.optimizer),
            "task": resolve_task(self.data.task).name,
            "data": {
                name: getattr(self.data, name) for name in ("inputs_length", "targets_length", "batch_size", "pack")
            },
            "steps": self.run.steps,
            "seed": self.run.seed,
            "micro_batches": self.run.micro_batches,
            "vocabulary": fingerprint_vocabulary(self.vocabulary()),
            "teacher": None if self.teacher is None else self.teacher.fingerprint,
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
    if teacher.vocabulary not in (None, fingerprint_vocabulary(vocabulary)):
        raise UserError(
            f"the teacher {teacher.source} was trained with another vocabulary than the task's; "
            "choose a task with the teacher's vocabulary"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        params: the trained parameters, on the mesh.
        report: its held-out figures.
        tokens: real tokens read, inputs and targets.
        seconds: spent in training steps, over all attempts; compilation included, evaluation and saving not.
    """

    params: Any
    report: DenoisingReport
    tokens: int
    seconds: float


def train(training: Training, held_out: HeldOut) -> TrainingResult:
    """Runs a training to its end, from its last checkpoint if there is one; a finished one is only evaluated."""
    return _Session(training, held_out).run()


class _Session:
    """The moving parts of a run in progress."""

    def __init__(self, training: Training, held_out: HeldOut):
        from endistill_jax.data.pipeline import make_iterator

        self.training, self.held_out = training, held_out
        data, run = training.data, training.run
        self.mesh = training.mesh()
        self.optimizer = make_optimizer(training.optimizer, run.steps)
        self.schedule = make_schedule(training.optimizer, run.steps)
        self.iterator = make_iterator(
            data.task,
            split="train",
            task_feature_lengths=data.feature_lengths,
            batch_size=data.batch_size,
            seed=run.seed,
            pack=data.pack,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.tokens, self.seconds = 0, 0.0

    def run(self) -> TrainingResult:
        training, run = self.training, self.training.run
        init_key, dropout_key = jax.random.split(jax.random.key(run.seed))
        with Checkpointer(
            f"{training.model_dir}/{CHECKPOINTS}",
            every=run.checkpoint_every,
            keep_last=run.keep_last,
            keep_best=run.keep_best,
        ) as self.checkpointer:
            resumed = self.checkpointer.latest_step()
            state = (
                self._restore(resumed) if resumed else init_state(training.config, self.optimizer, self.mesh, init_key)
            )
            first = resumed or 0
            with (
                MetricWriter(training.model_dir, resume_step=resumed, tensorboard=run.tensorboard) as self.writer,
                Progress(run.steps, first_step=first, description=training.label) as self.progress,
                StopSignal() as self.stop,
            ):
                write_run_files(training.model_dir)
                if resumed:
                    self.progress.say(f"resumed from step {resumed} of {training.model_dir}")
                if first < run.steps:
                    state = self._train(state, dropout_key)
                report = self.held_out.evaluate(training.config, state.params)
            return TrainingResult(params=state.params, report=report, tokens=self.tokens, seconds=self.seconds)

    def _train(self, state: TrainState, dropout_key: jax.Array) -> TrainState:
        training, teacher = self.training, self.training.teacher
        teacher_params = None
        if training.path.needs_teacher:
            teacher_params = jax.device_put(teacher.params, param_shardings(teacher.config, self.mesh))
        step = make_train_step(
            student=training.config,
            teacher=None if teacher is None else teacher.config,
            path=training.path,
            optimizer=self.optimizer,
            mesh=self.mesh,
            micro_batches=training.run.micro_batches,
            base_key=dropout_key,
        )
        self.since = time.monotonic()
        return train_loop(
            step,
            state,
            teacher_params,
            self._batches(),
            steps=training.run.steps,
            log_every=training.run.log_every,
            at_log=self._at_log,
        )

    def _batches(self) -> Iterator[dict[str, jax.Array]]:
        for batch in self.iterator:
            self.tokens += count_tokens(batch) * jax.process_count()
            yield place_batch(batch, self.mesh)

    def _at_log(self, step: int, state: TrainState, means: dict[str, float]) -> None:
        """Metrics first, then the checkpoint: a resumed run drops the lines after the step it resumes from."""
        run = self.training.run
        now = time.monotonic()
        elapsed, self.seconds = now - self.since, self.seconds + now - self.since
        if not np.isfinite(means["loss"]):
            raise UserError(
                f"the loss became {means['loss']} by step {step}; lower the learning rate (the last checkpoint, "
                f"of step {self.checkpointer.latest_step()}, is from before)"
            )
        scalars = means | {"learning_rate": float(self.schedule(step - 1)), "tokens": self.tokens}
        self.writer.write(step, scalars, timing={"seconds": self.seconds, "window_seconds": elapsed})
        self.progress.advance(step, {"loss": means["loss"]})

        metrics = None
        last = step == run.steps
        if run.eval_every and (step % run.eval_every == 0) or last:
            report = self.held_out.evaluate(self.training.config, state.params)
            metrics = report.scalars()
            self.writer.write(step, report.scalars("held_out/"))
            self.progress.say(
                f"step {step}: held-out loss {report.loss:.3f}, on pieces {report.piece_loss:.3f}, "
                f"a wrong input costs {report.wrong_input_cost:.3f}"
            )
        stopping = self.stop.requested and not last
        if step % run.checkpoint_every == 0 or last or stopping:
            facts = {"run": self.training.identity(), "progress": {"tokens": self.tokens, "seconds": self.seconds}}
            self.checkpointer.save(step, state, self.iterator.state(), facts, metrics, force=True)
        if stopping:
            self.checkpointer.wait()
            raise Stopped(f"stopped at step {step} of {run.steps}, which is saved; the same command goes on from there")
        self.since = time.monotonic()

    def _restore(self, step: int) -> TrainState:
        training = self.training
        facts = self.checkpointer.facts(step)
        check_facts(facts["run"], training.identity(), f"the checkpoint of step {step} in {training.model_dir}")
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state(training.config, self.optimizer),
            state_shardings(training.config, self.optimizer, self.mesh),
        )
        state, data_state, _ = self.checkpointer.restore(step, abstract)
        self.iterator.restore(data_state)
        self.tokens, self.seconds = facts["progress"]["tokens"], facts["progress"]["seconds"]
        return state


def count_tokens(batch: dict[str, np.ndarray]) -> int:
    """Real tokens of a batch, inputs and targets."""
    return int((batch["encoder_input_tokens"] != 0).sum() + (batch["decoder_target_tokens"] != 0).sum())
