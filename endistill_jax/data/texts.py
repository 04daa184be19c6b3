"""The plain texts that a task reads, before they become tokens."""

from collections.abc import Iterator

import seqio

from endistill_jax.data.registry import resolve_task
from endistill_jax.errors import UserError


def task_texts(task: str | seqio.Task, split: str = "train") -> Iterator[str]:
    """The texts of a task's source in a fixed order, for training a vocabulary.

    Args:
      task: one whose first preprocessor yields a string feature `targets`, as those of `span_corruption_task` do, or
        whose source has a string feature `text`.
      split: split to read.

    Raises:
      UserError: a mixture, no such split, or no text where it is looked for.
    """
    task = resolve_task(task)
    if isinstance(task, seqio.Mixture):
        raise UserError(f"{task.name} is a mixture; name one of its tasks: {', '.join(t.name for t in task.tasks)}")
    if split not in task.splits:
        raise UserError(f"task {task.name} has no split {split!r}; it has {', '.join(sorted(task.splits))}")
    dataset = task.source.get_dataset(split=split, shuffle=False)
    name = "text"
    if name not in dataset.element_spec:
        dataset, name = task.preprocessors[0](dataset), "targets"
    if name not in dataset.element_spec or dataset.element_spec[name].dtype.name != "string":
        raise UserError(f"found no text in the source of task {task.name}; its examples need a string feature 'text'")
    for example in dataset.as_numpy_iterator():
        yield example[name].decode("utf-8", errors="replace")
