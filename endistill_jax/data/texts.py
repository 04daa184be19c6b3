"""The plain texts of a source, before they become tokens: what a vocabulary is trained on."""

from collections.abc import Iterator

from endistill_jax.core.errors import UserError
from endistill_jax.data.registry import resolve_task
from endistill_jax.data.text_pipeline import seqio


def read_texts(
    source: seqio.DataSource | seqio.Task | str,
    *,
    split: str = "train",
    text_field: str = "text",
    max_documents: int | None = None,
) -> Iterator[str]:
    """The texts of a split, in a fixed order. What is asked for is checked at once, what is read only when it is.

    Args:
      source: a SeqIO source, or a task (or its name), whose source is read.
      split: split of the source.
      text_field: string feature of the source's examples.
      max_documents: at most so many; None reads all.

    Raises:
      UserError: a mixture, no such task, split or feature.
    """
    if not isinstance(source, seqio.DataSource):
        task = resolve_task(source)
        if isinstance(task, seqio.Mixture):
            raise UserError(f"{task.name} is a mixture; name one of its tasks: {', '.join(t.name for t in task.tasks)}")
        source = task.source
    if split not in source.splits:
        raise UserError(f"the source has no split {split!r}; it has {', '.join(sorted(source.splits))}")
    return _decoded(source, split, text_field, max_documents)


def _decoded(source: seqio.DataSource, split: str, text_field: str, max_documents: int | None) -> Iterator[str]:
    dataset = source.get_dataset(split=split, shuffle=False)
    if text_field not in dataset.element_spec:
        raise UserError(f"the source's examples have no {text_field!r}; they have {', '.join(dataset.element_spec)}")
    for example in dataset.take(-1 if max_documents is None else max_documents).as_numpy_iterator():
        yield example[text_field].decode("utf-8", errors="replace")
