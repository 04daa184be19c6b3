"""What a gin file, or plain Python, can run."""

import inspect
from collections.abc import Callable
from typing import Any

from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.errors import UserError
from endistill_jax.jobs.demo import demo
from endistill_jax.jobs.distill import distill
from endistill_jax.jobs.downstream import downstream
from endistill_jax.jobs.evaluate import evaluate
from endistill_jax.jobs.export import export
from endistill_jax.jobs.finetune import Finetuning, finetune
from endistill_jax.jobs.import_checkpoint import import_checkpoint
from endistill_jax.jobs.infer import Reading, infer
from endistill_jax.jobs.plan import PlanOptions
from endistill_jax.jobs.pretrain import pretrain
from endistill_jax.jobs.settings import Data, Run
from endistill_jax.jobs.train_vocabulary import train_vocabulary

__all__ = [
    "Data",
    "Finetuning",
    "Reading",
    "Run",
    "StudentInit",
    "demo",
    "distill",
    "downstream",
    "evaluate",
    "export",
    "finetune",
    "import_checkpoint",
    "infer",
    "pretrain",
    "run",
    "train_vocabulary",
]


def run(job: Callable[..., Any], dry_run: bool = False, plan: PlanOptions | None = None) -> Any:
    """Runs one job; what a gin file binds.

    Args:
        job: a job with all its settings bound, such as `@jobs.distill`.
        dry_run: passed on to the job: print what would be done, and do nothing.
        plan: passed on to the job: compile its step for chips that are not here, and do nothing else.

    Raises:
        UserError: if a plan is asked of a job that has none.
    """
    if plan is not None:
        if "plan" not in inspect.signature(job).parameters:
            raise UserError(
                f"{getattr(job, '__name__', job)} has no step to plan; plan a file that distils or pretrains"
            )
        return job(plan=plan)
    return job(dry_run=dry_run)
