"""Distillation: a small student, an objective, and a frozen teacher; without one, pretraining."""

from endistill_jax.evaluation.held_out import prepare_held_out
from endistill_jax.jobs.plan import PlanOptions, plan_experiment
from endistill_jax.reports.results import model_row, print_results, reference_rows
from endistill_jax.train.description import describe
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.run import TrainingResult, train
from endistill_jax.train.training import open_training


def distill(
    *, model_dir: str, experiment: Experiment, dry_run: bool = False, plan: PlanOptions | None = None
) -> TrainingResult | None:
    """Runs an experiment, from the start or from the last checkpoint in `model_dir`.

    Args:
        model_dir: receives checkpoints, metrics and the final table.
        experiment: the training setup.
        dry_run: print what would be done, and do nothing.
        plan: AOT-compile the step for a topology, report its requirements, and do nothing else.

    Returns:
        The student's parameters and held-out metrics; None after a dry run or a plan.

    Raises:
        UserError: invalid settings, before anything is created.
        Stopped: a signal stopped the run; progress is saved.
    """
    if plan is not None:
        plan_experiment(plan, experiment)
        return None
    label = "distill" if experiment.objective.needs_teacher else "train"
    training = open_training(model_dir, experiment, label=label)
    training.check()
    if dry_run:
        print(describe(training))
        return None
    rows, teacher = [], training.teacher
    if teacher is not None:
        training.load_teacher()  # fails before the corpus is read
    held_out = prepare_held_out(experiment.data, training.mesh())
    result = train(training, held_out)
    if teacher is not None:
        report = held_out.evaluate(teacher.config, teacher.params, experiment.teacher_sharding)
        rows.append(model_row(f"teacher ({teacher.source})", teacher.config, report, None, None))
    name = "model" if teacher is None else "student"
    rows.append(model_row(name, experiment.student, result.report, result.tokens, result.seconds))
    print_results(model_dir, [*rows, *reference_rows(result.report)], "Held-out denoising, nats a token")
    return result
