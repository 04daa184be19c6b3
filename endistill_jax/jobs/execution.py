"""A training run in progress: open or resume the model directory, train, evaluate, save."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from endistill_jax.checkpoints.fingerprint import check_facts
from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.student_init import init_from_teacher
from endistill_jax.errors import Stopped, UserError
from endistill_jax.evaluation.denoising import DenoisingReport
from endistill_jax.jobs.held_out import HeldOut
from endistill_jax.jobs.models import CHECKPOINTS, keep_tokenizer
from endistill_jax.jobs.training import Training
from endistill_jax.reports.run_files import write_run_files
from endistill_jax.sharding import place_batch
from endistill_jax.train.loop import train_loop
from endistill_jax.train.metrics import MetricWriter, Progress
from endistill_jax.train.optimizer import make_optimizer, make_schedule
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step
from endistill_jax.train.stopping import StopSignal


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
    return _Execution(training, held_out).run()


class _Execution:
    """The moving parts of a run in progress."""

    def __init__(self, training: Training, held_out: HeldOut):
        from endistill_jax.data.pipeline import make_iterator

        self.training, self.held_out = training, held_out
        data, run = training.data, training.run
        self.mesh = training.mesh()
        if training.teacher is not None:
            training.teacher.load_on(self.mesh)
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
        self.report: DenoisingReport | None = None  # of the last step, once it is there

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
            state = self._start(init_key) if resumed is None else self._restore(resumed)
            first = resumed or 0
            with (
                MetricWriter(training.model_dir, resume_step=resumed, tensorboard=run.tensorboard) as self.writer,
                Progress(run.steps, first_step=first, description=training.label) as self.progress,
                StopSignal() as self.stop,
            ):
                if jax.process_index() == 0:
                    write_run_files(training.model_dir)
                    if training.vocabulary_file() is not None:
                        keep_tokenizer(training.model_dir, training.vocabulary_file())
                if resumed:
                    self.progress.say(f"resumed from step {resumed} of {training.model_dir}")
                if first < run.steps:
                    state = self._train(state, dropout_key)
                report = self.report or self.held_out.evaluate(training.config, state.params)
            return TrainingResult(params=state.params, report=report, tokens=self.tokens, seconds=self.seconds)

    def _start(self, key: jax.Array) -> TrainState:
        training, params = self.training, None
        if training.student_init.kind != "random":
            params = init_from_teacher(
                training.student_init,
                training.teacher.load_on(self.mesh),
                teacher=training.teacher.config,
                student=training.config,
                mesh=self.mesh,
            )
        return init_state(training.config, self.optimizer, self.mesh, key, params)

    def _train(self, state: TrainState, dropout_key: jax.Array) -> TrainState:
        training, teacher = self.training, self.training.teacher
        teacher_params = None
        if training.path.needs_teacher:
            teacher_params = teacher.load_on(self.mesh)
        step = make_train_step(
            student=training.config,
            teacher=None if teacher is None else teacher.config,
            path=training.path,
            optimizer=self.optimizer,
            mesh=self.mesh,
            micro_batches=training.run.micro_batches,
            base_key=dropout_key,
            computation=training.run.losses,
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
            metrics, self.report = report.scalars(), report if last else None
            self.writer.write(step, report.scalars("held_out/"))
            self.progress.say(
                f"step {step}: held-out loss {report.loss:.3f}, on pieces {report.piece_loss:.3f}, "
                f"a wrong input costs {report.wrong_input_cost:.3f}"
            )
        stopping = self.stop.number is not None and not last
        if step % run.checkpoint_every == 0 or last or stopping:
            teacher = self.training.teacher
            facts = {
                "run": self.training.identity(),
                "progress": {"tokens": self.tokens, "seconds": self.seconds},
                "teacher": None if teacher is None else {"source": teacher.source},
                "held_out": metrics,
            }
            self.checkpointer.save(step, state, self.iterator.state(), facts, metrics, force=True)
        if stopping:
            self.checkpointer.wait()
            raise Stopped(
                f"stopped at step {step} of {run.steps}, which is saved; the same command goes on from there",
                self.stop.number,
            )
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
