"""A study: ways to train a student, compared over seeds by held-out metrics and fine-tuning."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from endistill_jax.checkpoints.manifest import check_same
from endistill_jax.checkpoints.models import CHECKPOINTS, PRODUCT, TOKENIZER, TrainedModel
from endistill_jax.core.errors import UserError, naming, whole_numbers
from endistill_jax.multihost import code_versions
from endistill_jax.objectives import Objective
from endistill_jax.reports.files import json_text
from endistill_jax.sharding import host_part
from endistill_jax.studies.arms import Arm, StudyRun, plan_study
from endistill_jax.studies.report import print_study, write_report
from endistill_jax.studies.results import raw_file, read_raw, write_raw
from endistill_jax.studies.runs import prepare_evaluations, run_to_end, settle_shards, study_eval_spec, teacher_metrics
from endistill_jax.train.experiment import Data, Experiment, check_folder_names
from endistill_jax.train.finetuning import Finetuning
from endistill_jax.train.metrics import TENSORBOARD
from endistill_jax.train.training import describe, open_teacher


def study(
    *,
    model_dir: str,
    experiment: Experiment,
    arms: Mapping[str, Arm],
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str = "scratch",
    tasks: Mapping[str, Finetuning] | None = None,
    probe: Objective | None = None,
    probe_batches: int = 4,
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Trains the student once for every arm and seed, fine-tunes what comes of it, and compares the arms.

    All arms of a seed start from the same parameters and read the same batches; the fine-tuning is the same for all.
    Each is a run in `<model_dir>/<arm>/seed_<n>/`, its fine-tunings are in `<task>/` in that. What has ended is not run
    again.

    Args:
        model_dir: receives the runs and, after each of them, `study.json` with every metric, `study.md` and the plots.
        experiment: what arms have where they set nothing of their own; its objective is unused. Without `Data.shards`
            there are as many as hosts when the study first starts. `Run.eval_every` gives the points of the curves.
        arms: name -> how the student is trained.
        seeds: one run of every arm for each.
        baseline: the arm that differences are taken to, seed by seed.
        tasks: name -> how every student is fine-tuned and evaluated: once, with the seed of its training.
        probe: the terms that are measured between the teacher and every student on held-out text; None measures none.
        probe_batches: how many of the held-out batches the probe reads.
        dry_run: print what would be done, and do nothing.

    Returns:
        The content of `study.json`, see `studies.results`; None after a dry run.

    Raises:
        UserError: invalid settings, before anything is created.
        Stopped: a signal stopped the run; progress is saved, and the same command resumes.
    """
    tasks = tasks or {}
    seeds = whole_numbers(seeds, "study.seeds")
    _check(arms, seeds, baseline, tasks, probe_batches)
    if experiment.teacher is None:
        raise UserError("study.experiment has no teacher; give it a jobs.Teacher")
    teacher, sharding = open_teacher(experiment.teacher, experiment.student.scan_layers), experiment.teacher_sharding
    mesh = experiment.run.mesh_of_devices()
    earlier = read_raw(model_dir) if raw_file(model_dir).exists() else None
    data, tasks = settle_shards(experiment.data, tasks, earlier, host_part(mesh).count)
    experiment = dataclasses.replace(experiment, data=data)
    runs = plan_study(model_dir, experiment, teacher, arms, seeds=seeds, tasks=tasks)
    # Those of one seed: the others differ in nothing that can be wrong.
    first = {each.arm: each for each in runs[: len(arms)]}
    for each in first.values():
        each.check(mesh)
        _check_probe(probe, each, teacher)
    if dry_run:
        _print_plan(list(first.values()), len(runs), tasks)
        return None

    teacher.load_on(mesh, sharding)  # a damaged teacher fails before the rest
    spec = study_eval_spec(runs[0], teacher, probe, probe_batches)
    if earlier is not None:
        check_same(earlier["eval_spec"], json.loads(json_text(spec)), str(raw_file(model_dir)))
    ended, left = [], []
    for each in runs:
        (ended if each.has_ended else left).append(each)
    ended_runs = [run_to_end(each, None) for each in ended]  # those of other settings fail before the data is read
    metrics_of_teacher, evaluations = earlier and earlier["teacher_metrics"], None
    if earlier is None or left:
        evaluations = prepare_evaluations(runs, teacher, probe, probe_batches)
        metrics_of_teacher = metrics_of_teacher or teacher_metrics(teacher, evaluations.held_out, sharding)
    raw: dict[str, Any] = {
        "baseline": baseline,
        "seeds": list(seeds),
        "arms": {name: each.settings() for name, each in first.items()},
        "teacher": {"source": teacher.source, "dtype": teacher.config.dtype} | teacher.config.architecture(),
        **{name: _settings(value) for name, value in (("data", data), ("run", experiment.run), ("tasks", tasks))},
        "eval_spec": spec,
        "versions": code_versions(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "teacher_metrics": metrics_of_teacher,
        # What has ended comes first, so that none of it is missing while the rest is run.
        "runs": ended_runs,
    }
    _write(model_dir, raw)
    for each in left:
        raw["runs"].append(run_to_end(each, evaluations))
        _write(model_dir, raw)
    if jax.process_index() == 0:
        print_study(raw)
    return raw


def _write(model_dir: str, raw: dict[str, Any]) -> None:
    """Writes what is known so far: before any run has ended only how runs are evaluated."""
    if jax.process_index() == 0:
        write_raw(model_dir, raw)
        if raw["runs"]:
            write_report(model_dir, raw)


def _check(
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    baseline: str,
    tasks: Mapping[str, Finetuning],
    probe_batches: int,
) -> None:
    for name, given in (("arms", arms), ("seeds", seeds)):
        if not given:
            raise UserError(f"study.{name} is empty; give at least one")
    for name, given, kind in (("arms", arms, Arm), ("tasks", tasks, Finetuning)):
        by_name = isinstance(given, Mapping)
        wrong = [each for each in given.values() if not isinstance(each, kind)] if by_name else [given]
        if wrong:
            raise UserError(f"study.{name} has {wrong[0]!r}; give a jobs.{kind.__name__} for each name")
    check_folder_names(arms, "study.arms")
    check_folder_names(tasks, "study.tasks", taken=(CHECKPOINTS, TOKENIZER, PRODUCT, TENSORBOARD))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"study.seeds is {seeds}; give each seed once")
    if baseline not in arms:
        raise UserError(f"study.baseline is {baseline!r}, which is no arm; choose one of {', '.join(arms)}")
    if probe_batches < 1:
        raise UserError(f"study.probe_batches is {probe_batches}; it must be at least 1")
    for task, how in tasks.items():
        if how.run.keep_best is not None:
            raise UserError(
                f"task {task} has Run.keep_best = {how.run.keep_best!r}, but a study compares fine-tunings after their "
                "last step; leave keep_best and patience None"
            )
        if how.seeds or len(how.learning_rates) > 1:
            raise UserError(
                f"task {task} has Finetuning.learning_rates = {how.learning_rates} and seeds = {how.seeds}; a study "
                "fine-tunes every student once, at one learning rate and with the seed of its training"
            )


def _check_probe(probe: Objective | None, run: StudyRun, teacher: TrainedModel) -> None:
    if probe is None:
        return
    if not probe.needs_teacher:
        raise UserError("study.probe compares nothing with the teacher; give it a term that reads one, or None")
    for training in run.trainings:
        with naming(f"study.probe with the student of {training.label}"):
            probe.validate(training.student, teacher.config)
            if own := probe.init_params(jax.random.key(0), training.student, teacher.config):
                raise UserError(f"{', '.join(own)} has parameters of its own, which no student has; leave it out")


def _print_plan(runs: Sequence[StudyRun], count: int, tasks: Mapping[str, Finetuning]) -> None:
    for run in runs:
        if run.chain is not None:
            print(f"{run.arm}\n{run.chain.describe()}")
        for training in run.trainings:
            print(f"{training.label}\n{describe(training)}\n")
    for task in tasks:
        print(f"{task}\n{describe(runs[0].finetuning_of(task, runs[0].training.student))}\n")
    print(f"{count} runs ({len(runs)} arms), {count * len(tasks)} fine-tunings")


def _settings(value: Any) -> Any:
    """Settings, and those in them, as plain values; a task by its name."""
    from endistill_jax.data.text_pipeline import resolve_task

    if isinstance(value, Mapping):
        return {name: _settings(each) for name, each in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    plain = {field.name: _settings(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return plain | ({"task": resolve_task(value.task).name} if isinstance(value, Data) else {})
