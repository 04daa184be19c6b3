"""A run, from the first line to the last: devices, data, teacher, state, step, loop, result."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.manifest import SCHEMA, Manifest, plain
from endistill_jax.checkpoints.models import CHECKPOINTS, keep_tokenizer
from endistill_jax.checkpoints.student_init import init_from_teacher
from endistill_jax.core.errors import Stopped, UserError
from endistill_jax.evaluation import Evaluation, Report
from endistill_jax.multihost import agree, agree_on_folder, gather, reporting_failure
from endistill_jax.reports.files import write_run_files
from endistill_jax.sharding import HostPart, host_part, place_batch
from endistill_jax.train.metrics import open_metrics, open_progress
from endistill_jax.train.optimizer import make_optimizer, make_schedule
from endistill_jax.train.progress import Best, Progress, StopSignal
from endistill_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from endistill_jax.train.step import make_train_step, window_means
from endistill_jax.train.training import Training


@dataclasses.dataclass(kw_only=True)
class TrainingResult(Progress):
    """The trained parameters, on the mesh; their held-out metrics; and the totals of the run."""

    params: Any
    report: Report


def train(training: Training, evaluation: Evaluation) -> TrainingResult:
    """Runs a training to its end, resuming from the last checkpoint if there is one; a finished run is only evaluated.

    Raises `Stopped` after saving if a signal stops it.
    """
    agree_on_folder(training.model_dir)
    # Other hosts are notified of failures before the checkpoints are closed, which would wait for them.
    with open_checkpoints(training) as checkpointer, reporting_failure():
        # ---- Devices, and the step to resume from

        mesh = training.mesh()
        rows = host_part(mesh)
        resumed = checkpointer.latest_step()
        manifest = None if resumed is None else checkpointer.manifest(resumed)

        # ---- Other models: loaded before the student takes any memory; then all hosts agree on what is run

        training = training.with_shards(manifest)
        student, objective, run = training.student, training.objective, training.run
        teacher = training.teacher_config
        teacher_params = None if training.teacher is None else training.load_teacher()
        if training.initial is not None:
            training.load_initial()  # onto the mesh: a fingerprint of what was not loaded would read it onto every host
        agree("run", plain(training.identity()) | {"resumed from step": resumed})

        # ---- Data: in as many shards as the run started with, whatever the number of hosts now

        iterator = make_training_iterator(training, rows)

        # ---- State: fresh, initialized from the teacher, or restored together with the position in the data

        optimizer = make_optimizer(training.experiment.optimizer, run.steps)
        schedule = make_schedule(training.experiment.optimizer, run.steps)
        init_key, dropout_key = jax.random.split(jax.random.key(run.seed))
        progress = Progress(best=Best(metric=run.keep_best, mode=run.best_mode, patience=run.patience))
        if resumed is None:
            params = initial_params(training, teacher_params)
            state = init_state(student, optimizer, mesh, init_key, params, objective=objective, teacher=teacher)
            del params
        else:
            training.check_resumes(resumed, manifest)
            shapes = abstract_state(student, optimizer, objective, teacher)
            state = restore_state(
                checkpointer, resumed, shapes, state_shardings(student, optimizer, mesh, objective, teacher), iterator
            )
            progress.restore(manifest, continued=training.is_continued(manifest))
        del init_key  # not used anymore
        if training.initial is not None:
            training.initial.release()

        # ---- Step

        train_step = make_train_step(
            student=student,
            teacher=teacher,
            objective=objective,
            optimizer=optimizer,
            mesh=mesh,
            micro_batches=run.micro_batches,
            base_key=dropout_key,
            implementation=run.losses,
            teacher_sharding=training.experiment.teacher_sharding,
            compiler_options=run.compiler_options,
        )
        if not objective.needs_teacher:
            teacher_params = None

        # ---- Loop: never blocks on the devices between logs, so the next batch is read while a step runs

        first, report, window = resumed or 0, None, []
        with (
            open_metrics(training.model_dir, resume_step=resumed, tensorboard=run.tensorboard) as writer,
            open_progress(run.steps, first_step=first, description=training.label) as screen,
            StopSignal() as stop,
        ):
            if jax.process_index() == 0:
                write_run_files(training.model_dir)
                if training.vocabulary_file() is not None:
                    keep_tokenizer(training.model_dir, training.vocabulary_file())
            screen.say(start_line(training, resumed, manifest))
            if resumed is None and run.eval_at_start:
                writer.write(0, evaluation.evaluate(student, state.params).scalars("held_out/"))

            started = time.monotonic()
            own_tokens = 0  # of this host, since the last log
            for step in range(first + 1, run.steps + 1) if not progress.finished else ():
                batch = next(iterator)
                own_tokens += count_tokens(batch) if rows.leads else 0
                state, metrics = train_step(state, teacher_params, place_batch(batch, mesh))
                window.append(metrics)
                if step % run.log_every and step != run.steps:
                    continue

                # -- Log. One collective sums the hosts' tokens and synchronizes stop signals.
                means = window_means(window)
                window.clear()
                elapsed = time.monotonic() - started
                gathered = gather([own_tokens, stop.number or 0])  # [hosts, 2]
                own_tokens, signal_number = 0, int(gathered[:, 1].max())
                progress.tokens += int(gathered[:, 0].sum())
                progress.seconds += elapsed
                check_finite(means["loss"], step, checkpointer.latest_step())
                scalars = means | {"learning_rate": float(schedule(step - 1)), "tokens": progress.tokens}
                writer.write(step, scalars, timing={"seconds": progress.seconds, "window_seconds": elapsed})
                screen.advance(step, {"loss": means["loss"]})

                # -- Evaluate
                last, improved, held_out = step == run.steps, False, None
                if (run.eval_every and step % run.eval_every == 0) or last:
                    report = evaluation.evaluate(student, state.params)
                    held_out = report.scalars()
                    improved = progress.best.update(step, held_out)
                    last = last or progress.best.is_over
                    writer.write(step, report.scalars("held_out/"))
                    screen.say(f"step {step}: {report.summary()}")

                # -- Save. Metrics are already written: a resumed run drops lines after the step it resumes from.
                stopping = signal_number != 0 and not last
                progress.finished = last
                if step % run.checkpoint_every == 0 or last or stopping or improved:
                    positions = iterator.state() if rows.leads else {}
                    saved = make_manifest(training, progress, held_out)
                    checkpointer.save(step, state.saved(), positions, saved, held_out, force=True)

                # -- Stop
                if stopping:
                    checkpointer.wait()
                    raise Stopped(
                        f"stopped at step {step} of {run.steps}, which is saved; the same command resumes from there",
                        signal_number,
                    )
                if last:
                    break
                started = time.monotonic()

            # ---- Result: a finished run is evaluated again

            report = report or evaluation.evaluate(student, state.params)
        return TrainingResult(params=state.params, report=report, **vars(progress))


def open_checkpoints(training: Training) -> Checkpointer:
    """The checkpoint manager of a training."""
    run = training.run
    return Checkpointer(
        f"{training.model_dir}/{CHECKPOINTS}",
        every=run.checkpoint_every,
        keep_last=run.keep_last,
        keep_best=run.keep_best,
        best_mode=run.best_mode,
    )


def make_training_iterator(training: Training, rows: HostPart) -> Any:
    """The stream of this host's rows of every batch."""
    from endistill_jax.data.pipeline import make_iterator

    data = training.data
    return make_iterator(
        data.task,
        split="train",
        task_feature_lengths=data.feature_lengths,
        batch_size=data.batch_size,
        seed=training.run.seed,
        pack=data.pack,
        shards=data.shards,
        part_index=rows.index,
        part_count=rows.count,
    )


def initial_params(training: Training, teacher_params: Any) -> Any:
    """Initial parameters from a trained model or cut from the teacher; None for random ones."""
    if training.initial is not None:
        return training.load_initial()
    init = training.experiment.init
    if init.kind == "random":
        return None
    return init_from_teacher(
        init, teacher_params, teacher=training.teacher_config, student=training.student, mesh=training.mesh()
    )


def restore_state(
    checkpointer: Checkpointer, step: int, shapes: TrainState, shardings: TrainState, iterator: Any
) -> TrainState:
    """Restores the state of a step onto its devices, and the position in the data."""
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes.saved(),
        shardings.saved(),
    )
    state, positions, _ = checkpointer.restore(step, abstract, iterator.names)
    iterator.restore(positions)
    return TrainState(**state)


def make_manifest(training: Training, progress: Progress, held_out: dict[str, float] | None) -> Manifest:
    """The manifest of a checkpoint."""
    sources = {"teacher": training.teacher, "initial": training.initial}
    return {
        "schema": SCHEMA,
        "run": plain(training.identity()),
        "progress": progress.plain(),
        **{role: None if model is None else {"source": model.source} for role, model in sources.items()},
        "held_out": held_out,
    }


def start_line(training: Training, resumed: int | None, manifest: Manifest | None) -> str:
    """Describes what a run starts from, what is kept, and what is reset."""
    if resumed is None:
        if training.initial is not None:
            return (
                f"starts from the parameters of {training.initial.source}, step {training.initial.step}; "
                "optimizer, schedule and data start from scratch"
            )
        return f"starts at step 0 in {training.model_dir}"
    if training.is_continued(manifest):
        return (
            f"continues a finished run of {manifest['run']['steps']} steps to {training.run.steps}: parameters, "
            "optimizer state and position in the data are kept; the learning-rate schedule is that of the new length"
        )
    return f"resumed from step {resumed} of {training.model_dir}"


def check_finite(loss: float, step: int, saved: int | None) -> None:
    if not np.isfinite(loss):
        raise UserError(
            f"the loss became {loss} by step {step}; lower the learning rate (the last checkpoint, of step {saved}, "
            "is from before)"
        )


def count_tokens(batch: dict[str, np.ndarray]) -> int:
    """Real tokens of a batch, inputs and targets."""
    return int((batch["encoder_input_tokens"] != 0).sum() + (batch["decoder_target_tokens"] != 0).sum())
