"""The demonstration: does a small student learn more from a teacher than from the text alone?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from endistill_jax.checkpoints.models import open_model, tell_notes
from endistill_jax.core.errors import UserError
from endistill_jax.core.settings import whole_numbers
from endistill_jax.evaluation.held_out import HeldOut, prepare_held_out
from endistill_jax.models.t5.config import T5Config
from endistill_jax.objectives import Path
from endistill_jax.reports.results import merge_seeds, model_row, reference_rows, tell
from endistill_jax.train.description import describe
from endistill_jax.train.optimizer import OptimizerConfig
from endistill_jax.train.run import train
from endistill_jax.train.experiment import Data, Run
from endistill_jax.train.training import Training


def demo(
    *,
    model_dir: str,
    teacher: str,
    student: T5Config,
    path: Path,
    data: Data,
    optimizer: OptimizerConfig,
    run: Run,
    scratch_optimizer: OptimizerConfig | None = None,
    seeds: Sequence[int] = (0,),
    teacher_dtype: str = "float32",
    dry_run: bool = False,
) -> list[dict[str, Any]] | None:
    """Trains the same student twice, with and without a teacher, and compares them on held-out text.

    Both start from the same parameters and see the same batches for the same number of steps.

    Args:
        model_dir: receives a folder for every run, and the table.
        teacher: "bundled", a Hugging Face T5 folder or hub name, a T5X checkpoint, or the model directory of a run.
        student: shape of the student; the teacher's layers run in a compiled loop if the student's do.
        path: what the distilled student learns from.
        data: what all of them read.
        optimizer: how the distilled student is updated.
        run: length and seed-independent settings of each run.
        scratch_optimizer: how the student without a teacher is updated; by default the same way.
        seeds: one pair of runs for each; the table then shows mean and spread.
        teacher_dtype: type of the teacher's parameters and computations.
        dry_run: print what would be done, and do nothing.

    Returns:
        The rows of the table, a list of one number a seed where there are several; None after a dry run.

    Raises:
        UserError: for settings that do not fit, before anything is created.
        Stopped: when a signal asked the run to stop; what was done is saved, and the same command goes on.
    """
    seeds = whole_numbers(seeds, "demo.seeds")
    if not seeds:
        raise UserError("demo.seeds is empty; give at least one seed, such as (0,)")
    taught_by = open_model(teacher, teacher_dtype, student.scan_layers)
    tell_notes(taught_by)
    common = {"config": student, "data": data}
    arms = {
        "distilled": {"path": path, "optimizer": optimizer, "teacher": taught_by},
        "scratch": {"path": Path(lm_weight=1.0), "optimizer": scratch_optimizer or optimizer},
    }
    trainings = {
        arm: [
            Training(
                model_dir=f"{model_dir}/{arm}" + (f"_seed_{seed}" if len(seeds) > 1 else ""),
                run=dataclasses.replace(run, seed=seed),
                label=f"{arm}, seed {seed}" if len(seeds) > 1 else arm,
                **common,
                **settings,
            )
            for seed in seeds
        ]
        for arm, settings in arms.items()
    }
    for training in (training for each in trainings.values() for training in each):
        training.check()
    if dry_run:
        print("\n\n".join(f"{arm}\n{describe(each[0])}" for arm, each in trainings.items()))
        return None

    first = trainings["distilled"][0]
    first.load_teacher()  # what is wrong with it shows before the corpus is read
    held_out = prepare_held_out(data, first.mesh())
    report = held_out.evaluate(taught_by.config, taught_by.params, run.teacher_placement)
    rows = [model_row(f"teacher ({teacher})", taught_by.config, report, None, None)]
    for arm, each in trainings.items():
        rows.append(merge_seeds([_train_row(f"student, {arm}", training, held_out) for training in each]))
    rows += reference_rows(report)
    tell(model_dir, rows, "Held-out denoising, nats a token")
    return rows


def _train_row(name: str, training: Training, held_out: HeldOut) -> dict[str, Any]:
    result = train(training, held_out)
    return model_row(name, training.config, result.report, result.tokens, result.seconds)
