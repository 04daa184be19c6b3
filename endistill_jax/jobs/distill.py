"""Distillation: a frozen teacher, a small student, and the path between them."""

from endistill_jax.checkpoints.models import open_model, tell_notes
from endistill_jax.checkpoints.student_init import RANDOM, StudentInit
from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.held_out import prepare_held_out
from endistill_jax.jobs.plan import PlanOptions, plan_training, shape_of_teacher
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.reports.results import model_row, reference_rows, tell
from endistill_jax.train.description import describe
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.run import TrainingResult, train
from endistill_jax.train.experiment import Data, Run
from endistill_jax.train.training import Training


def distill(
    *,
    model_dir: str,
    teacher: str,
    student: T5Config,
    path: Path,
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
    teacher_dtype: str = "bfloat16",
    teacher_config: T5Config | None = None,
    student_init: StudentInit = RANDOM,
    dry_run: bool = False,
    plan: PlanOptions | None = None,
) -> TrainingResult | None:
    """Trains a student to agree with a teacher, from the start or from the last checkpoint in `model_dir`.

    Args:
        model_dir: receives checkpoints, metrics and the final table.
        teacher: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run.
        student: shape of the student; the teacher's layers run in a compiled loop if the student's do.
        path: which attention relations are compared, and whether logits are.
        data: what both read; its vocabulary must be the teacher's.
        optimizer: how the student is updated.
        run: how long, on which mesh, what is kept.
        teacher_dtype: type of the teacher's parameters and computations.
        teacher_config: the teacher's shape, for planning without a checkpoint; a checkpoint of another is refused.
        student_init: what the student starts from: fresh parameters, or the teacher's layers, whole or cut narrower.
        dry_run: print what would be done, and do nothing.
        plan: compile the step for chips that are not here, tell what it needs there, and do nothing else.

    Returns:
        The student's parameters and held-out figures; None after a dry run or a plan.

    Raises:
        UserError: for settings that do not fit, before anything is created.
        Stopped: when a signal asked the run to stop; what was done is saved.
    """
    if plan is not None:
        shape = shape_of_teacher(teacher, teacher_config)
        settings = {"path": path, "data": data, "optimizer": optimizer, "run": run}
        teacher_config = as_teacher(shape, teacher_dtype, student.scan_layers)
        plan_training(plan, student=student, teacher=teacher_config, **settings)
        return None
    taught_by = open_model(teacher, teacher_dtype, student.scan_layers)
    tell_notes(taught_by)
    if teacher_config is not None:
        check_shape(teacher, taught_by.config, teacher_config)
    training = Training(
        model_dir=model_dir,
        config=student,
        path=path,
        data=data,
        optimizer=optimizer,
        run=run,
        teacher=taught_by,
        student_init=student_init,
        label="distill",
    )
    training.check()
    if dry_run:
        print(describe(training))
        return None
    training.load_teacher()  # what is wrong with it shows before the corpus is read
    held_out = prepare_held_out(data, training.mesh())
    result = train(training, held_out)
    report = held_out.evaluate(taught_by.config, taught_by.params, run.teacher_placement)
    rows = [
        model_row(f"teacher ({teacher})", taught_by.config, report, None, None),
        model_row("student", student, result.report, result.tokens, result.seconds),
        *reference_rows(report),
    ]
    tell(model_dir, rows, "Held-out denoising, nats a token")
    return result


def as_teacher(shape: T5Config, dtype: str, scan_layers: bool) -> T5Config:
    """A teacher's settings from its shape alone, as `open_model` gives them."""
    return T5Config(**shape.architecture(), dtype=dtype, scan_layers=scan_layers)


def check_shape(source: str, found: T5Config, expected: T5Config) -> None:
    """A teacher must have the shape that was said, and planned with.

    Raises:
        UserError: naming what differs.
    """
    said = expected.architecture()
    differing = [
        f"{name} {value} instead of {said[name]}" for name, value in found.architecture().items() if value != said[name]
    ]
    if differing:
        raise UserError(f"the teacher {source} is not what teacher_config says: {', '.join(differing)}; correct one")
