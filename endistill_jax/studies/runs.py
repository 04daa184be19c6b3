"""Evaluation of the runs of a study, and their results."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from endistill_jax.checkpoints.manifest import plain
from endistill_jax.checkpoints.models import TrainedModel
from endistill_jax.core.errors import naming
from endistill_jax.evaluation import Evaluation, JointEvaluation
from endistill_jax.evaluation.denoising import HeldOut, eval_spec, prepare_held_out
from endistill_jax.evaluation.probe import Probe
from endistill_jax.interpolation.chain import run_chain
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.objectives import Objective
from endistill_jax.studies.arms import StudyRun
from endistill_jax.studies.results import Raw
from endistill_jax.train.experiment import Data
from endistill_jax.train.finetuning import Finetuning, metric_names, prepare_evaluation, run_all
from endistill_jax.train.metrics import FILE_NAME, read_metrics
from endistill_jax.train.run import train
from endistill_jax.train.training import finished

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


def prepare_evaluations(
    runs: Sequence[StudyRun], teacher: TrainedModel, probe: Objective | None, probe_batches: int
) -> Evaluations:
    """Reads all held-out examples of the evaluations."""
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
    """
    with naming(f"arm {run.arm}, seed {run.seed}"):
        if run.chain is None:
            results = [finished(run.training) or train(run.training, evaluations.students)]
        else:  # the study's teacher is needed by other arms and by the probe
            results = run_chain(run.chain, lambda mesh: evaluations.students, release_teacher=False)
        stages = [
            {"tokens": result.tokens, "seconds": result.seconds, "evaluations": _evaluations(training.model_dir)}
            for result, training in zip(results, run.trainings, strict=True)
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


def _evaluations(model_dir: str) -> list[Record]:
    """The held-out metrics of a run in order, each with its step."""
    return [
        {"step": line["step"]} | {name.removeprefix(HELD_OUT): line[name] for name in line if name.startswith(HELD_OUT)}
        for line in read_metrics(f"{model_dir}/{FILE_NAME}")
        if any(name.startswith(HELD_OUT) for name in line)
    ]


def teacher_metrics(teacher: TrainedModel, held_out: HeldOut, sharding: str) -> Record:
    """The teacher's size and held-out metrics."""
    report = held_out.evaluate(teacher.config, teacher.params, sharding)
    return {"parameters": count_params(abstract_params(teacher.config))} | report.scalars()


def settle_shards(
    data: Data, tasks: Mapping[str, Finetuning], earlier: Raw | None, hosts: int
) -> tuple[Data, dict[str, Finetuning]]:
    """The data of a study and its tasks with as many shards as at the study's first start, so that arms read alike.

    Args:
        data: of the training.
        tasks: name -> fine-tuning; takes as many shards as the training where it does not set them.
        earlier: what an earlier start wrote.
        hosts: number of shards if neither the settings nor an earlier start set it.
    """
    shards = data.shards or (earlier and earlier["eval_spec"].get("shards")) or hosts
    settled = {}
    for task, how in tasks.items():
        with naming(f"task {task}"):
            own = dataclasses.replace(how.data, shards=how.data.shards or shards)
        settled[task] = dataclasses.replace(how, data=own)
    return dataclasses.replace(data, shards=shards), settled


def study_eval_spec(run: StudyRun, teacher: TrainedModel, probe: Objective | None, probe_batches: int) -> Record:
    """The eval_spec of all runs, except for the tasks, as plain values."""
    data = run.training.data
    return eval_spec(data) | {
        "shards": data.shards,
        "teacher": teacher.fingerprint,
        "teacher_dtype": teacher.config.dtype,
        "probe": probe and {"objective": plain(probe.described()), "examples": probe_batches * data.eval_batch_size},
    }
