"""What a gin file, or plain Python, can run."""

import inspect
from collections.abc import Callable
from typing import Any

from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.core.errors import UserError
from endistill_jax.interpolation.stages import Interpolation, StageSettings
from endistill_jax.jobs.convert import export, import_checkpoint
from endistill_jax.jobs.demo import demo
from endistill_jax.jobs.distill import distill
from endistill_jax.jobs.evaluate import evaluate
from endistill_jax.jobs.finetune import downstream, finetune
from endistill_jax.jobs.infer import Reading, infer
from endistill_jax.jobs.interpolate import interpolate
from endistill_jax.jobs.plan import PlanOptions
from endistill_jax.jobs.study import study
from endistill_jax.jobs.train_vocabulary import train_vocabulary
from endistill_jax.studies.arms import Arm
from endistill_jax.train.experiment import Data, Experiment, Run, Teacher
from endistill_jax.train.finetuning import Finetuning

__all__ = [
    "Arm",
    "Data",
    "Experiment",
    "Finetuning",
    "Interpolation",
    "Reading",
    "Run",
    "StageSettings",
    "StudentInit",
    "Teacher",
    "demo",
    "distill",
    "downstream",
    "evaluate",
    "export",
    "finetune",
    "import_checkpoint",
    "infer",
    "interpolate",
    "run",
    "study",
    "train_vocabulary",
]


def run(
    job: Callable[..., Any], dry_run: bool = False, plan: PlanOptions | None = None, data_dir: str | None = None
) -> Any:
    """Runs one job; what a gin file binds.

    Args:
        job: a job with all its settings bound, such as `@jobs.distill`.
        dry_run: passed to the job: print what would be done, and do nothing.
        plan: passed to the job: AOT-compile its step for a topology, and do nothing else.
        data_dir: where TensorFlow Datasets keeps prepared data, local or on a bucket; None for its own default, which
            the environment variable TFDS_DATA_DIR sets.
    """
    if plan is not None:
        if "plan" not in inspect.signature(job).parameters:
            raise UserError(
                f"{getattr(job, '__name__', job)} has no step to plan; plan a file that distills or pretrains"
            )
        return job(plan=plan)
    if data_dir is not None:
        from endistill_jax.data.text_pipeline import read_prepared_from

        read_prepared_from(data_dir)
    return job(dry_run=dry_run)
