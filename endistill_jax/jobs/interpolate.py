"""Interpolated distillation: from a large teacher over assistants to a small student, a distillation for each."""

import json
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from endistill_jax.checkpoints.models import open_model, tell_notes
from endistill_jax.checkpoints.student_init import RANDOM, StudentInit
from endistill_jax.evaluation.denoising import DenoisingReport
from endistill_jax.evaluation.held_out import HeldOut, judged_on, prepare_held_out
from endistill_jax.interpolation.chain import Chain, StageResult, plan_chain, run_chain
from endistill_jax.interpolation.settings import FEWEST, Interpolation
from endistill_jax.interpolation.stages import plan_stages
from endistill_jax.jobs.distill import as_teacher, check_shape
from endistill_jax.jobs.plan import PlanOptions, plan_stage_by_stage, shape_of_teacher
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.results import model_row, reference_rows, tell
from endistill_jax.storage import stored_path
from endistill_jax.train.description import describe
from endistill_jax.train.finished import is_finished
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.experiment import Data, Run

TEACHER_FILE = "teacher.json"


def interpolate(
    *,
    model_dir: str,
    teacher: str,
    student: T5Config,
    path: Path,
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
    interpolation: Interpolation = FEWEST,
    teacher_dtype: str = "bfloat16",
    teacher_config: T5Config | None = None,
    student_init: StudentInit = RANDOM,
    dry_run: bool = False,
    plan: PlanOptions | None = None,
) -> tuple[StageResult, ...] | None:
    """Distils a teacher into an assistant, that into the next, and the last into the student.

    Every stage is a run in `<model_dir>/stage_<n>/`, the student's the last; a finished one is not run again, and the
    same command goes on inside the one that was interrupted.

    Args:
        model_dir: receives the stages and the final table.
        teacher: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run.
        student: shape of the student; assistants are of its kind. Teachers' layers run in a compiled loop if its do.
        path: which attention relations are compared, and whether logits are.
        data: what all read; its vocabulary must be the teacher's.
        optimizer: how students are updated.
        run: how long each stage is, on which mesh, what is kept.
        interpolation: how many assistants, and what stages do in their own way.
        teacher_dtype: type of the teacher's parameters and computations, and of the assistants' when they teach.
        teacher_config: the teacher's shape, for planning without a checkpoint; a checkpoint of another is refused.
        student_init: what students start from: fresh parameters, or their own teacher's layers.
        dry_run: print what would be done, and do nothing.
        plan: compile every stage's step for chips that are not here, tell what it needs there, and do nothing else.

    Returns:
        The result of each stage, the student's last; None after a dry run or a plan.

    Raises:
        UserError: for settings that do not fit and products that are damaged, before anything is created.
        Stopped: when a signal asked the run to stop; what was done is saved.
    """
    settings: dict[str, Any] = {"path": path, "data": data, "optimizer": optimizer, "run": run}
    settings["student_init"] = student_init
    if plan is not None:
        shape = shape_of_teacher(teacher, teacher_config)
        taught_by = as_teacher(shape, teacher_dtype, student.scan_layers)
        plan_stage_by_stage(plan, plan_stages(taught_by, student, interpolation, **settings), path)
        return None
    opened = open_model(teacher, teacher_dtype, student.scan_layers)
    tell_notes(opened)
    if teacher_config is not None:
        check_shape(teacher, opened.config, teacher_config)
    chain = plan_chain(model_dir, opened, student, interpolation, **settings)
    chain.check()
    print(chain.describe())
    if dry_run:
        print("\n\n".join(f"{training.label}\n{describe(training)}" for training in chain.trainings))
        return None
    evaluation = _prepared_once(data)
    report = _teacher_report(model_dir, chain, evaluation)
    results = run_chain(chain, evaluation)
    rows = [model_row(f"teacher ({teacher})", opened.config, report, None, None)]
    for number, result in enumerate(results, 1):
        name = "student" if number == len(results) else f"assistant {number}"
        found = DenoisingReport.from_scalars(result.figures)
        rows.append(model_row(name, result.config, found, result.tokens, result.seconds))
    tell(model_dir, [*rows, *reference_rows(report)], "Held-out denoising, nats a token")
    print(f"the student is in {results[-1].model_dir}")
    return results


def _prepared_once(data: Data) -> Callable[[Mesh], HeldOut]:
    """The held-out evaluation by mesh; the examples are read when it is first asked for."""
    prepared: list[HeldOut] = []

    def on(mesh: Mesh) -> HeldOut:
        if not prepared:
            prepared.append(prepare_held_out(data, mesh))
        return prepared[0].on(mesh)

    return on


def _teacher_report(model_dir: str, chain: Chain, evaluation: Callable[[Mesh], HeldOut]) -> DenoisingReport:
    """The teacher's figures; where stage 1 is finished, those of then, so that nothing is read for them."""
    training = chain.trainings[0]
    file = stored_path(model_dir) / TEACHER_FILE
    first = chain.standings()[0][1]
    of = judged_on(training.data)
    finished = is_finished(first)
    if finished and file.exists():
        known = json.loads(file.read_text())
        if known["of"] == of | {"teacher": first["run"]["teacher"]}:
            return DenoisingReport.from_scalars(known["figures"])
    chain.load_teacher(1)  # what is wrong with it shows before the corpus is read
    placement = training.run.teacher_placement
    report = evaluation(training.mesh()).evaluate(training.teacher.config, training.teacher.params, placement)
    known = {"of": of | {"teacher": training.teacher.fingerprint}, "figures": report.scalars()}
    if finished:
        training.teacher.release()
    if jax.process_index() == 0:
        write_atomically(file, json_text(known, indent=1) + "\n")
    return report
