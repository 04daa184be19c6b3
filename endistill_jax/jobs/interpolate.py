"""Interpolated distillation: a distillation for each assistant between a large teacher and a small student."""

import functools
import json
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from endistill_jax.checkpoints.manifest import renamed_metrics
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.denoising import DenoisingReport, HeldOut, eval_spec, prepare_held_out
from endistill_jax.interpolation.chain import Chain, StageResult, plan_chain, run_chain
from endistill_jax.interpolation.stages import Interpolation, plan_stages
from endistill_jax.jobs.plan import PlanOptions, plan_stage_by_stage, with_teacher_config
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.table import model_row, print_results, reference_rows
from endistill_jax.storage import stored_path
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.training import describe, is_finished, open_teacher

TEACHER_FILE = "teacher.json"
FEWEST = Interpolation()


def interpolate(
    *,
    model_dir: str,
    experiment: Experiment,
    interpolation: Interpolation = FEWEST,
    dry_run: bool = False,
    plan: PlanOptions | None = None,
) -> tuple[StageResult, ...] | None:
    """Distills a teacher into an assistant, that into the next, and the last into the student.

    Every stage is a run in `<model_dir>/stage_<n>/`, the student's the last; a finished one is not run again, and the
    same command resumes inside the one that was interrupted.

    Args:
        model_dir: receives the stages and the final table.
        experiment: the distillation straight from teacher to student, which the stages are made from.
        interpolation: how many assistants, and per-stage overrides.
        dry_run: print what would be done, and do nothing.
        plan: AOT-compile every stage's step for a topology, report what it needs there, and do nothing else.

    Returns:
        The result of each stage, the student's last; None after a dry run or a plan.

    Raises:
        UserError: invalid settings and checkpoints that are damaged, before anything is created.
        Stopped: a signal stopped the run; progress is saved.
    """
    if experiment.teacher is None:
        raise UserError("interpolate.experiment has no teacher; give it a jobs.Teacher")
    if plan is not None:
        experiment = with_teacher_config(experiment)
        plan_stage_by_stage(plan, plan_stages(experiment, experiment.teacher.config, interpolation), experiment)
        return None
    teacher = open_teacher(experiment.teacher, experiment.student.scan_layers)
    chain = plan_chain(model_dir, experiment, teacher, interpolation)
    chain.check()
    print(chain.describe())
    if dry_run:
        print("\n\n".join(f"{training.label}\n{describe(training)}" for training in chain.trainings))
        return None
    # The examples are read at the first evaluation: in a finished chain there is none.
    prepared = functools.cache(lambda: prepare_held_out(experiment.data, chain.trainings[0].mesh()))

    def evaluation(mesh: Mesh) -> HeldOut:
        return prepared().on(mesh)

    report = _teacher_report(model_dir, chain, evaluation)
    results = run_chain(chain, evaluation)
    rows = [model_row(f"teacher ({teacher.source})", teacher.config, report, None, None)]
    for number, result in enumerate(results, 1):
        name = "student" if number == len(results) else f"assistant {number}"
        metrics = DenoisingReport.from_scalars(result.metrics)
        rows.append(model_row(name, result.config, metrics, result.tokens, result.seconds))
    print_results(model_dir, [*rows, *reference_rows(report)], "Held-out denoising, nats a token")
    print(f"the student is in {results[-1].model_dir}")
    return results


def _teacher_report(model_dir: str, chain: Chain, evaluation: Callable[[Mesh], HeldOut]) -> DenoisingReport:
    """The teacher's metrics; once stage 1 is finished, those that were saved, so that nothing is read for them."""
    training = chain.trainings[0]
    file = stored_path(model_dir) / TEACHER_FILE
    first = chain.stage_status()[0][1]
    spec = eval_spec(training.data)
    if is_finished(first) and file.exists():
        known = json.loads(file.read_text())
        if known["of"] == spec | {"teacher": first["run"]["teacher"]}:
            return DenoisingReport.from_scalars(renamed_metrics(known.get("metrics") or known["figures"]))
    chain.load_teacher(1)  # fails before the corpus is read
    sharding = training.experiment.teacher_sharding
    report = evaluation(training.mesh()).evaluate(training.teacher.config, training.teacher.params, sharding)
    known = {"of": spec | {"teacher": training.teacher.fingerprint}, "metrics": report.scalars()}
    if is_finished(first):
        training.teacher.release()
    if jax.process_index() == 0:
        write_atomically(file, json_text(known, indent=1) + "\n")
    return report
