"""What a gin file, or plain Python, can run."""

from collections.abc import Callable
from typing import Any

from endistill_jax.checkpoints.student_init import StudentInit
from endistill_jax.jobs.demo import demo
from endistill_jax.jobs.distill import distill
from endistill_jax.jobs.export import export
from endistill_jax.jobs.import_checkpoint import import_checkpoint
from endistill_jax.jobs.pretrain import pretrain
from endistill_jax.jobs.settings import Data, Run
from endistill_jax.jobs.train_vocabulary import train_vocabulary

__all__ = [
    "Data",
    "Run",
    "StudentInit",
    "demo",
    "distill",
    "export",
    "import_checkpoint",
    "pretrain",
    "run",
    "train_vocabulary",
]


def run(job: Callable[..., Any], dry_run: bool = False) -> Any:
    """Runs one job; what a gin file binds.

    Args:
        job: a job with all its settings bound, such as `@jobs.distill`.
        dry_run: passed on to the job: print what would be done, and do nothing.
    """
    return job(dry_run=dry_run)
