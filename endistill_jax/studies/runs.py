"""Evaluation of the runs of a study, and their results."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from endistill_jax.checkpoints.manifest import check_same, plain
from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.core.errors import naming
from endistill_jax.evaluation import Evaluation, JointEvaluation
from endistill_jax.evaluation.denoising import HeldOut, eval_spec, prepare_held_out
from endistill_jax.evaluation.probe import Probe
from endistill_jax.interpolation.chain import StageResult, run_chain
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.objectives import Objective
from endistill_jax.reports.files import json_text
from endistill_jax.studies.arms import StudyRun
from endistill_jax.studies.results import raw_file, read_raw
from endistill_jax.train.experiment import Data
from endistill_jax.train.finetuning import Finetuning, metric_names, prepare_evaluation, run_all
from endistill_jax.train.metrics import FILE_NAME, read_metrics
from endistill_jax.train.progress import Progress
from endistill_jax.train.run import train
from endistill_jax.train.training import finished, is_finished, last_manifest

HELD_OUT = "held_out/"

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluations:
    """The evaluations of a study, prepared once.

    Attributes:
        held_out: metrics that need no teacher.
        students: those and the probe, if any: the evaluation of students during training.
        tasks: of each task, its metrics.
    """

    held_out: HeldOut
    students: Evaluation
    tasks: Mapping[str, Evaluation]


def split_by_end(runs: Sequence[StudyRun]) -> tuple[list[StudyRun], list[StudyRun]]:
    """Complete runs, and those with something left to do."""
    ended, left = [], []
    for run in runs:
        (ended if all(is_finished(last_manifest(folder)[1]) for folder in run.folders) else left).append(run)
    return ended, left


def prepare_evaluations(
    runs: Sequence[StudyRun], teacher: TrainedModel, probe: Objective | None, probe_batches: int
) -> Evaluations:
    """Reads all held-out examples of the evaluations.

    Raises:
        UserError: a split without examples, or no metric of the name of a `Run.keep_best`.
    """
    training, mesh = runs[0].training, runs[0].training.mesh()
    held_out = prepare_held_out(training.data, mesh)
    parts: tuple[Evaluation, ...] = (held_out,)
    if probe is not None:
        sharding = training.experiment.teacher_sharding
        batches = held_out.batches[:probe_batches]
        parts += (Probe(objective=probe, teacher=teacher, mesh=mesh, batches=batches, teacher_sharding=sharding),)
    tasks = {
        task: prepare_evaluation([runs[0].finetuning_of(task, training.student)], how)
        for task, how in runs[0].tasks.items()
    }
    return Evaluations(held_out=held_out, students=JointEvaluation(evaluations=parts), tasks=tasks)


def run_to_end(run: StudyRun, evaluations: Evaluations | None) -> Record:
    """Trains and fine-tunes what is not complete, and returns all results.

    Args:
        run: checked.
        evaluations: None if the run is complete.

    Raises:
        UserError: naming arm and seed, for a loss that is no number and for what was run with other settings.
        Stopped: when a signal asked the run to stop.
    """
    with naming(f"arm {run.arm}, seed {run.seed}"):
        return _run_to_end(run, evaluations)


def _run_to_end(run: StudyRun, evaluations: Evaluations | None) -> Record:
    stages = [
        {"tokens": stage.tokens, "seconds": stage.seconds, "evaluations": _evaluations(training.model_dir)}
        for stage, training in zip(_trained(run, evaluations), run.trainings, strict=True)
    ]
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "evaluations": stages[-1]["evaluations"],
        "stages": stages if run.chain else [],
        "downstream": {},
    }
    for task, training in run.finetunings():
        with naming(f"task {task}"):
            (row,) = run_all([training], evaluations and evaluations.tasks[task])
        record["downstream"][task] = {
            "metrics": {name: row[name] for name in metric_names(row)},
            "step": round(row["best_step"]),
            "tokens": round(row["train_tokens"]),
            "seconds": row["seconds"],
        }
    return record


def _trained(run: StudyRun, evaluations: Evaluations | None) -> Sequence[Progress | StageResult]:
    """The results of every stage."""
    if run.chain is None:
        return [finished(run.training) or train(run.training, evaluations.students)]
    # The study's teacher is needed by other arms and by the probe.
    return run_chain(run.chain, lambda mesh: evaluations.students, release_teacher=False)


def teacher_metrics(teacher: TrainedModel, held_out: HeldOut, sharding: str) -> Record:
    """The teacher's size and held-out metrics."""
    report = held_out.evaluate(teacher.config, teacher.params, sharding)
    return {"parameters": count_params(abstract_params(teacher.config))} | report.scalars()


def settle_shards(
    data: Data, tasks: Mapping[str, Finetuning], earlier: Record | None, hosts: int
) -> tuple[Data, dict[str, Finetuning]]:
    """The data of a study and its tasks with as many shards as at the study's first start: arms then read alike.

    Args:
        data: of the training.
        tasks: name -> fine-tuning, which takes as many shards as the training where it does not say.
        earlier: what an earlier start wrote.
        hosts: number of shards if neither the settings nor an earlier start set it.

    Raises:
        UserError: for batches of a task that do not divide over the shards.
    """
    shards = data.shards or (earlier["judged_by"]["shards"] if earlier else hosts)
    settled = {}
    for task, how in tasks.items():
        with naming(f"task {task}"):
            own = dataclasses.replace(how.data, shards=how.data.shards or shards)
        settled[task] = dataclasses.replace(how, data=own)
    return dataclasses.replace(data, shards=shards), settled


def eval_spec_of(run: StudyRun, teacher: TrainedModel, probe: Objective | None, probe_batches: int) -> Record:
    """The eval_spec of all runs, except for the tasks, as plain values."""
    data = run.training.data
    return eval_spec(data) | {
        "shards": data.shards,
        "teacher": teacher.fingerprint,
        "teacher_dtype": teacher.config.dtype,
        "probe": probe and {"objective": plain(probe.described()), "examples": probe_batches * data.eval_batch_size},
    }


def earlier_record(model_dir: str) -> Record | None:
    """The results of an earlier start of the study, if any.

    Raises:
        UserError: the file is not of a study.
    """
    return read_raw(model_dir) if raw_file(model_dir).exists() else None


def check_judged_alike(model_dir: str, earlier: Record | None, judged: Record) -> None:
    """Checks that runs of an earlier start have the same eval_spec.

    Raises:
        UserError: naming each difference.
    """
    if earlier is not None:
        check_same(earlier["judged_by"], json.loads(json_text(judged)), str(raw_file(model_dir)))


def _evaluations(model_dir: str) -> list[Record]:
    """The held-out metrics of a run in order, each with its step."""
    return [
        {"step": line["step"]} | {name.removeprefix(HELD_OUT): line[name] for name in line if name.startswith(HELD_OUT)}
        for line in read_metrics(f"{model_dir}/{FILE_NAME}")
        if any(name.startswith(HELD_OUT) for name in line)
    ]
