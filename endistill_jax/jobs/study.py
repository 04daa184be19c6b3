"""A study: ways to train a student, compared over seeds by held-out figures and by the same fine-tuning."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from endistill_jax.checkpoints.models import CHECKPOINTS, PRODUCT, TOKENIZER, TrainedModel, open_model, tell_notes
from endistill_jax.core.errors import UserError, naming
from endistill_jax.core.settings import whole_numbers
from endistill_jax.jobs.finetune import Finetuning
from endistill_jax.models.t5.config import T5Config
from endistill_jax.multihost.agreement import code_facts
from endistill_jax.objectives import Path
from endistill_jax.sharding import host_part, make_mesh
from endistill_jax.studies.arms import Arm, StudyRun, plan_study
from endistill_jax.studies.report import print_study, write_raw, write_report
from endistill_jax.studies.runs import (
    check_judged_alike,
    earlier_record,
    judged_by,
    prepare_evaluations,
    run_to_end,
    settle_shards,
    split_by_end,
    teacher_figures,
)
from endistill_jax.train.description import describe
from endistill_jax.train.metrics import TENSORBOARD
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.experiment import Data, Run, check_folder_names


def study(
    *,
    model_dir: str,
    teacher: str,
    student: T5Config,
    arms: Mapping[str, Arm],
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str = "scratch",
    tasks: Mapping[str, Finetuning] | None = None,
    probe: Path | None = None,
    probe_batches: int = 4,
    teacher_dtype: str = "float32",
    dry_run: bool = False,
) -> dict[str, Any] | None:
    """Trains the student once for every arm and seed, fine-tunes what comes of it, and compares the arms.

    All arms of a seed start from the same parameters and read the same batches; the fine-tuning is the same for all.
    Each is a run in `<model_dir>/<arm>/seed_<n>/`, its fine-tunings are in `<task>/` in that. What has ended is not run
    again.

    Args:
        model_dir: receives the runs and, after each of them, `study.json` with every figure, `study.md` and the plots.
        teacher: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run.
        student: shape of the student; the teacher's layers run in a compiled loop if the student's do.
        arms: name -> how the student is trained.
        data: what all of them read. Without `shards` these are as many as hosts when the study first starts.
        optimizer: how students are updated, where an arm does not say.
        run: length and seed-independent settings of each run. `eval_every` gives the points of the curves.
        seeds: one run of every arm for each.
        baseline: the arm that differences are taken to, seed by seed.
        tasks: name -> how every student is fine-tuned and judged: once, with the seed of its training.
        probe: the terms that are measured between the teacher and every student on held-out text; None measures none.
        probe_batches: how many of the held-out batches the probe reads.
        teacher_dtype: type of the teacher's parameters and computations.
        dry_run: print what would be done, and do nothing.

    Returns:
        What `study.json` holds, see `reports.study_figures`; None after a dry run.

    Raises:
        UserError: for settings that do not fit, before anything is created.
        Stopped: when a signal asked the run to stop; what was done is saved, and the same command goes on.
    """
    tasks = tasks or {}
    seeds = whole_numbers(seeds, "study.seeds")
    _check(arms, seeds, baseline, tasks, probe_batches)
    taught_by = open_model(teacher, teacher_dtype, student.scan_layers)
    tell_notes(taught_by)
    earlier, mesh = earlier_record(model_dir), make_mesh(*run.mesh, slices=run.slices)
    data, tasks = settle_shards(data, tasks, earlier, host_part(mesh).count)
    common = {"data": data, "optimizer": optimizer, "run": run, "seeds": seeds, "tasks": tasks}
    runs = plan_study(model_dir, taught_by, student, arms, **common)
    # Those of one seed: the others differ in nothing that can be wrong.
    first = {each.arm: each for each in runs[: len(arms)]}
    for each in first.values():
        each.check(mesh)
        _check_probe(probe, each, taught_by)
    if dry_run:
        _print_plan(list(first.values()), len(runs), tasks)
        return None

    taught_by.load_on(mesh, run.teacher_placement)  # what is wrong with it shows before the rest
    judged = judged_by(runs[0], taught_by, probe, probe_batches)
    check_judged_alike(model_dir, earlier, judged)
    ended, left = split_by_end(runs)
    told = [run_to_end(each, None) for each in ended]
    figures, evaluations = earlier and earlier["teacher_figures"], None
    if earlier is None or left:
        evaluations = prepare_evaluations(runs, taught_by, probe, probe_batches)
        figures = figures or teacher_figures(taught_by, evaluations.held_out, run.teacher_placement)
    raw: dict[str, Any] = {
        "baseline": baseline,
        "seeds": list(seeds),
        "arms": {name: each.settings() for name, each in first.items()},
        "teacher": {"source": teacher, "dtype": teacher_dtype} | taught_by.config.architecture(),
        **{name: _settings(value) for name, value in (("data", data), ("run", run), ("tasks", tasks))},
        "judged_by": judged,
        "versions": code_facts(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "teacher_figures": figures,
        "runs": told,  # what has ended comes first, so that none of it is missing while the rest is run
    }
    _write(model_dir, raw)
    for each in left:
        raw["runs"].append(run_to_end(each, evaluations))
        _write(model_dir, raw)
    if jax.process_index() == 0:
        print_study(raw)
    return raw


def _write(model_dir: str, raw: dict[str, Any]) -> None:
    """Writes what is known so far: before any run has ended how runs are judged, and nothing to report."""
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
        if not isinstance(given, Mapping):
            raise UserError(f"study.{name} is {given!r}; give them by name")
        for key, each in given.items():
            if not isinstance(each, kind):
                raise UserError(f"study.{name} has {each!r} for {key!r}; give a jobs.{kind.__name__}")
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
                f"task {task} has Run.keep_best = {how.run.keep_best!r}, but the figures of a study's fine-tunings are "
                "those of their last step; leave keep_best and patience None"
            )
        for name in ("learning_rates", "seeds"):
            if len(getattr(how, name)) > (name == "learning_rates"):
                raise UserError(
                    f"task {task} has Finetuning.{name} = {getattr(how, name)}; a study fine-tunes every student once, "
                    "at one learning rate and with the seed of its training"
                )


def _check_probe(probe: Path | None, run: StudyRun, teacher: TrainedModel) -> None:
    if probe is None:
        return
    if not probe.needs_teacher:
        raise UserError("study.probe compares nothing with the teacher; give it a site or a logits_weight, or None")
    for training in run.trainings:
        with naming(f"study.probe with the student of {training.label}"):
            probe.validate(training.config, teacher.config)


def _print_plan(runs: Sequence[StudyRun], count: int, tasks: Mapping[str, Finetuning]) -> None:
    for run in runs:
        if run.chain is not None:
            print(f"{run.arm}\n{run.chain.describe()}")
        for training in run.trainings:
            print(f"{training.label}\n{describe(training)}\n")
    for task in tasks:
        print(f"{task}\n{describe(runs[0].finetuning_of(task, runs[0].training.config))}\n")
    print(f"{count} runs ({len(runs)} arms), {count * len(tasks)} fine-tunings")


def _settings(value: Any) -> Any:
    """Settings, and those in them, as plain values; a task by its name."""
    from endistill_jax.data.registry import resolve_task

    if isinstance(value, Mapping):
        return {name: _settings(each) for name, each in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    plain = {field.name: _settings(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return plain | ({"task": resolve_task(value.task).name} if isinstance(value, Data) else {})
