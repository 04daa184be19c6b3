"""A training run in progress: open or resume the model directory, train, evaluate, save."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.models import CHECKPOINTS, keep_tokenizer
from endistill_jax.checkpoints.student_init import init_from_teacher
from endistill_jax.core.errors import Stopped, UserError
from endistill_jax.evaluation.report import Evaluation, Report
from endistill_jax.multihost.agreement import agree, agree_on_folder
from endistill_jax.multihost.initialize import gather
from endistill_jax.multihost.shutdown import telling_others
from endistill_jax.reports.run_files import write_run_files
from endistill_jax.sharding import host_part, place_batch
from endistill_jax.train.best import Best
from endistill_jax.train.finished import check_same_run
from endistill_jax.train.loop import train_loop
from endistill_jax.train.metrics import MetricWriter, Progress, Unheard
from endistill_jax.train.optimizer import make_optimizer, make_schedule
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step
from endistill_jax.train.stopping import StopSignal
from endistill_jax.train.training import Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        params: the trained parameters, on the mesh.
        report: its held-out figures.
        best: the best evaluation by the metric of `Run.keep_best`; without one, the last.
        tokens: real tokens read, inputs and targets.
        seconds: spent in training steps, over all attempts; compilation included, evaluation and saving not.
    """

    params: Any
    report: Report
    best: Best
    tokens: int
    seconds: float


def train(training: Training, evaluation: Evaluation) -> TrainingResult:
    """Runs a training to its end, from its last checkpoint if there is one; a finished one is only evaluated."""
    return _Execution(training, evaluation).run()


class _Execution:
    """The moving parts of a run in progress."""

    def __init__(self, training: Training, evaluation: Evaluation):
        self.training, self.evaluation = training, evaluation
        run = training.run
        self.mesh = training.mesh()
        if training.teacher is not None:
            training.load_teacher()
        if training.initial is not None:
            training.load_initial()
        self.optimizer = make_optimizer(training.optimizer, run.steps)
        self.schedule = make_schedule(training.optimizer, run.steps)
        self.part = host_part(self.mesh)
        self.heard = jax.process_index() == 0
        self.tokens, self.seconds = 0, 0.0
        self.own_tokens = 0  # of this host, since the last log
        self.report: Report | None = None  # of the last step, once it is there
        self.best = Best(metric=run.keep_best, mode=run.best_mode, patience=run.patience)
        self.finished = False

    def run(self) -> TrainingResult:
        training, run = self.training, self.training.run
        agree_on_folder(training.model_dir)
        with (
            Checkpointer(
                f"{training.model_dir}/{CHECKPOINTS}",
                every=run.checkpoint_every,
                keep_last=run.keep_last,
                keep_best=run.keep_best,
                best_mode=run.best_mode,
            ) as self.checkpointer,
            telling_others(),
        ):
            resumed = self.checkpointer.latest_step()
            self._settle_data(resumed)
            return self._run(resumed)

    def _settle_data(self, resumed: int | None) -> None:
        """Makes the data stream: of as many shards as the run began with, whatever the number of hosts now."""
        from endistill_jax.data.pipeline import make_iterator

        data, run = self.training.data, self.training.run
        saved = {} if resumed is None else self.checkpointer.facts(resumed)["run"].get("data", {})
        data = dataclasses.replace(data, shards=data.shards or saved.get("shards", self.part.count))
        self.training = dataclasses.replace(self.training, data=data)
        agree("run", self.training.identity() | {"resumed from step": resumed})
        self.iterator = make_iterator(
            data.task,
            split="train",
            task_feature_lengths=data.feature_lengths,
            batch_size=data.batch_size,
            seed=run.seed,
            pack=data.pack,
            shards=data.shards,
            part_index=self.part.index,
            part_count=self.part.count,
        )

    def _run(self, resumed: int | None) -> TrainingResult:
        training, run = self.training, self.training.run
        init_key, dropout_key = jax.random.split(jax.random.key(run.seed))
        state = self._start(init_key) if resumed is None else self._restore(resumed)
        if training.initial is not None:
            training.initial.release()
        first = resumed or 0
        with self._writer(resumed) as self.writer, self._progress(first) as self.progress, StopSignal() as self.stop:
            if self.heard:
                write_run_files(training.model_dir)
                if training.vocabulary_file() is not None:
                    keep_tokenizer(training.model_dir, training.vocabulary_file())
            if resumed:
                self.progress.say(f"resumed from step {resumed} of {training.model_dir}")
            if resumed is None and run.eval_at_start:
                report = self.evaluation.evaluate(training.config, state.params)
                self.writer.write(0, report.scalars("held_out/"))
            if not self.finished:
                state = self._train(state, dropout_key)
            report = self.report or self.evaluation.evaluate(training.config, state.params)
        return TrainingResult(
            params=state.params, report=report, best=self.best, tokens=self.tokens, seconds=self.seconds
        )

    def _writer(self, resumed: int | None) -> MetricWriter | Unheard:
        if not self.heard:
            return Unheard()
        return MetricWriter(self.training.model_dir, resume_step=resumed, tensorboard=self.training.run.tensorboard)

    def _progress(self, first: int) -> Progress | Unheard:
        if not self.heard:
            return Unheard()
        return Progress(self.training.run.steps, first_step=first, description=self.training.label)

    def _start(self, key: jax.Array) -> TrainState:
        training, params = self.training, None
        if training.initial is not None:
            params = training.load_initial()
        elif training.student_init.kind != "random":
            params = init_from_teacher(
                training.student_init,
                training.load_teacher(),
                teacher=training.teacher.config,
                student=training.config,
                mesh=self.mesh,
            )
        return init_state(training.config, self.optimizer, self.mesh, key, params)

    def _train(self, state: TrainState, dropout_key: jax.Array) -> TrainState:
        training, teacher = self.training, self.training.teacher
        teacher_params = None
        if training.path.needs_teacher:
            teacher_params = training.load_teacher()
        step = make_train_step(
            student=training.config,
            teacher=None if teacher is None else teacher.config,
            path=training.path,
            optimizer=self.optimizer,
            mesh=self.mesh,
            micro_batches=training.run.micro_batches,
            base_key=dropout_key,
            computation=training.run.losses,
            teacher_placement=training.run.teacher_placement,
            compiler_options=training.run.compiler_options,
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
            self.own_tokens += count_tokens(batch) if self.part.leads else 0
            yield place_batch(batch, self.mesh)

    def _at_log(self, step: int, state: TrainState, means: dict[str, float]) -> bool:
        """Metrics first, then the checkpoint: a resumed run drops the lines after the step it resumes from.

        Returns whether this was the last step.
        """
        run = self.training.run
        now = time.monotonic()
        elapsed, self.seconds = now - self.since, self.seconds + now - self.since
        if not np.isfinite(means["loss"]):
            raise UserError(
                f"the loss became {means['loss']} by step {step}; lower the learning rate (the last checkpoint, "
                f"of step {self.checkpointer.latest_step()}, is from before)"
            )
        stop = self._gather()
        scalars = means | {"learning_rate": float(self.schedule(step - 1)), "tokens": self.tokens}
        self.writer.write(step, scalars, timing={"seconds": self.seconds, "window_seconds": elapsed})
        self.progress.advance(step, {"loss": means["loss"]})

        metrics, improved = None, False
        last = step == run.steps
        if run.eval_every and (step % run.eval_every == 0) or last:
            report = self.evaluation.evaluate(self.training.config, state.params)
            metrics = report.scalars()
            improved = self.best.see(step, metrics)
            last = last or self.best.is_over
            self.report = report if last else None
            self.writer.write(step, report.scalars("held_out/"))
            self.progress.say(f"step {step}: {report.summary()}")
        stopping = stop != 0 and not last
        if step % run.checkpoint_every == 0 or last or stopping or improved:
            self._save(step, state, metrics, last)
        if stopping:
            self.checkpointer.wait()
            raise Stopped(
                f"stopped at step {step} of {run.steps}, which is saved; the same command goes on from there",
                stop,
            )
        self.since = time.monotonic()
        return last

    def _save(self, step: int, state: TrainState, metrics: dict[str, float] | None, last: bool) -> None:
        sources = {"teacher": self.training.teacher, "initial": self.training.initial}
        progress = {"tokens": self.tokens, "seconds": self.seconds, "best": self.best.facts(), "finished": last}
        facts = {
            "run": self.training.identity(),
            "progress": progress,
            **{role: None if model is None else {"source": model.source} for role, model in sources.items()},
            "held_out": metrics,
        }
        positions = self.iterator.state() if self.part.leads else {}
        self.checkpointer.save(step, state, positions, facts, metrics, force=True)

    def _gather(self) -> int:
        """Adds up the hosts' tokens, and returns the signal that asked one of them to stop: 0 if there was none."""
        gathered = gather([self.own_tokens, self.stop.number or 0])  # [hosts, 2]
        self.tokens, self.own_tokens = self.tokens + int(gathered[:, 0].sum()), 0
        return int(gathered[:, 1].max())

    def _restore(self, step: int) -> TrainState:
        training = self.training
        facts = self.checkpointer.facts(step)
        check_same_run(training, step, facts)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_state(training.config, self.optimizer),
            state_shardings(training.config, self.optimizer, self.mesh),
        )
        state, data_state, _ = self.checkpointer.restore(step, abstract, self.iterator.names)
        self.iterator.restore(data_state)
        progress = facts["progress"]
        self.tokens, self.seconds = progress["tokens"], progress["seconds"]
        if "best" in progress:
            self.best.restore(progress["best"])
        self.finished = progress.get("finished", step == training.run.steps)
        return state


def count_tokens(batch: dict[str, np.ndarray]) -> int:
    """Real tokens of a batch, inputs and targets."""
    return int((batch["encoder_input_tokens"] != 0).sum() + (batch["decoder_target_tokens"] != 0).sum())
