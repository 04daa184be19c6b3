"""Finding SeqIO tasks by name."""

import difflib
import importlib
import pkgutil

from endistill_jax import tasks
from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import seqio, tf


def task_modules() -> list[str]:
    """Every module of `endistill_jax.tasks`; importing one registers its tasks, so a new file needs no entry."""
    return [f"{tasks.__name__}.{module.name}" for module in pkgutil.iter_modules(tasks.__path__)]


def resolve_task(task: str | seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name; one that is given as an object is returned as it is.

    Whoever reads examples comes here first, so this is where TensorFlow is kept off the GPUs.

    Raises:
      UserError: no such name; the message lists known ones that are like it.
    """
    hide_gpus()
    if not isinstance(task, str):
        return task
    for module in task_modules():
        importlib.import_module(module)
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if task not in known:
        similar = difflib.get_close_matches(task, known, n=3, cutoff=0.5) or known
        raise UserError(f"no task or mixture named {task!r}; there is {', '.join(similar)}")
    return seqio.get_mixture_or_task(task)


def hide_gpus() -> None:
    """Keeps TensorFlow from taking the memory of every GPU it sees, which JAX needs.

    TensorFlow allows it only before its first operation, and any number of times.
    """
    tf.config.set_visible_devices([], "GPU")
