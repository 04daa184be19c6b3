"""The demo: does distillation beat training on the text alone?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from endistill_jax.core.errors import UserError, whole_numbers
from endistill_jax.evaluation.denoising import HeldOut, prepare_held_out
from endistill_jax.objectives import presets
from endistill_jax.reports.table import merge_seeds, model_row, print_results, reference_rows
from endistill_jax.train.experiment import Experiment
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.run import train
from endistill_jax.train.training import Training, describe, open_teacher


def demo(
    *,
    model_dir: str,
    experiment: Experiment,
    scratch_optimizer: OptimizerConfig | None = None,
    seeds: Sequence[int] = (0,),
    dry_run: bool = False,
) -> list[dict[str, Any]] | None:
    """Trains the same student twice, with and without a teacher, and compares them on held-out text.

    Both start from the same parameters and see the same batches for the same number of steps.

    Args:
        model_dir: receives a folder for every run, and the table.
        experiment: how the student is distilled.
        scratch_optimizer: how the student without a teacher is updated; by default the same way.
        seeds: one pair of runs for each; the table then shows mean and spread.
        dry_run: print what would be done, and do nothing.

    Returns:
        The rows of the table; None after a dry run.

    Raises:
        Stopped: a signal stopped the run; progress is saved, and the same command resumes.
    """
    seeds = whole_numbers(seeds, "demo.seeds")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"demo.seeds is {seeds}; give at least one, and each once")
    if experiment.teacher is None:
        raise UserError("demo.experiment has no teacher; give it a jobs.Teacher")
    teacher = open_teacher(experiment.teacher, experiment.student.scan_layers)
    scratch = dataclasses.replace(
        experiment,
        objective=presets.scratch(),
        optimizer=scratch_optimizer or experiment.optimizer,
        teacher=None if experiment.init.kind == "random" else experiment.teacher,  # both start alike
    )

    def trainings(arm: str, of: Experiment) -> list[Training]:
        return [
            Training(
                model_dir=f"{model_dir}/{arm}" + (f"_seed_{seed}" if len(seeds) > 1 else ""),
                experiment=dataclasses.replace(of, run=dataclasses.replace(of.run, seed=seed)),
                teacher=None if of.teacher is None else teacher,
                label=f"{arm}, seed {seed}" if len(seeds) > 1 else arm,
            )
            for seed in seeds
        ]

    arms = {"distilled": trainings("distilled", experiment), "scratch": trainings("scratch", scratch)}
    for training in (training for each in arms.values() for training in each):
        training.check()
        training.check_saved()
    if dry_run:
        print("\n\n".join(f"{arm}\n{describe(each[0])}" for arm, each in arms.items()))
        return None

    first = arms["distilled"][0]
    first.load_teacher()  # fails before the corpus is read
    held_out = prepare_held_out(experiment.data, first.mesh())
    report = held_out.evaluate(teacher.config, teacher.params, experiment.teacher_sharding)
    rows = [model_row(f"teacher ({teacher.source})", teacher.config, report, None, None)]
    for arm, each in arms.items():
        rows.append(merge_seeds([_train_row(f"student, {arm}", training, held_out) for training in each]))
    rows += reference_rows(report)
    print_results(model_dir, rows, "Held-out denoising, nats a token")
    return rows


def _train_row(name: str, training: Training, held_out: HeldOut) -> dict[str, Any]:
    result = train(training, held_out)
    return model_row(name, training.student, result.report, result.tokens, result.seconds)
