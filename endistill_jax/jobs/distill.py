"""Distillation: a small student, an objective, and a frozen teacher; without one, pretraining."""

import jax

from endistill_jax.core.errors import UserError
from endistill_jax.evaluation.denoising import HeldOut, prepare_held_out
from endistill_jax.evaluation.probe import PREFIX, Probe
from endistill_jax.jobs.plan import PlanOptions, plan_experiment
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.objectives import Objective
from endistill_jax.reports.table import DENOISING_COLUMNS, Column, model_row, print_results, reference_rows
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.run import TrainingResult, train
from endistill_jax.train.training import Training, describe, open_training


def distill(
    *, model_dir: str, experiment: Experiment, dry_run: bool = False, plan: PlanOptions | None = None
) -> TrainingResult | None:
    """Runs an experiment, from the start or from the last checkpoint in `model_dir`.

    Args:
        model_dir: receives checkpoints, metrics and the final table.
        experiment: the training setup.
        dry_run: print what would be done, and do nothing; returns None.
        plan: AOT-compile the step for a topology, report its requirements, and do nothing else; returns None.
    """
    if plan is not None:
        plan_experiment(plan, experiment)
        return None
    label = "distill" if experiment.objective.needs_teacher else "train"
    training = open_training(model_dir, experiment, label=label)
    training.check()
    training.check_saved()
    if dry_run:
        print(describe(training))
        return None
    rows, teacher = [], training.teacher
    if teacher is not None:
        training.load_teacher()  # fails before the corpus is read
    held_out = prepare_held_out(experiment.data, training.mesh())
    if not experiment.student.depth("decoder"):
        return _distill_encoder(training, held_out)
    result = train(training, held_out)
    if teacher is not None:
        report = held_out.evaluate(teacher.config, teacher.params, experiment.teacher_sharding)
        rows.append(model_row(f"teacher ({teacher.source})", teacher.config, report, None, None))
    name = "model" if teacher is None else "student"
    rows.append(model_row(name, experiment.student, result.report, result.tokens, result.seconds))
    print_results(model_dir, [*rows, *reference_rows(result.report)], "Held-out denoising, nats a token")
    return result


def _distill_encoder(training: Training, held_out: HeldOut) -> TrainingResult:
    """Trains an encoder alone, which has no loss on text: it is evaluated by how far it is from its teacher."""
    student, objective, teacher = training.student, training.objective, training.teacher
    own = objective.init_params(jax.random.key(0), student, teacher.config)
    terms = tuple(term for term in objective.terms if term.name not in own)
    if not terms:
        raise UserError("every term has parameters of its own, and none can evaluate an encoder; add presets.encoder's")
    metrics = [f"{PREFIX}{term.name}" for term in terms]
    if training.run.keep_best not in (None, *metrics):
        raise UserError(f"Run.keep_best is {training.run.keep_best!r}; an encoder has {', '.join(metrics)}")
    probe = Probe(
        objective=Objective(terms=terms),
        teacher=teacher,
        mesh=held_out.mesh,
        batches=held_out.batches,
        teacher_sharding=training.experiment.teacher_sharding,
    )
    result = train(training, probe)
    size = {"model": "student", "parameters": count_params(abstract_params(student))}
    row = size | result.report.scalars() | {"train_tokens": result.tokens, "seconds": result.seconds}
    columns = [column for column in DENOISING_COLUMNS if column.key in row]
    columns[2:2] = [Column(key=name, title=name, kind="loss") for name in result.report.scalars()]
    print_results(training.model_dir, [row], f"Held-out text, distance from {teacher.source}, nats a row", columns)
    return result
