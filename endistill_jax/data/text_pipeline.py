"""SeqIO and TensorFlow, imported in one place: where they are missing, whoever reads tasks says so in one line."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterator

from endistill_jax import tasks
from endistill_jax.core.errors import UserError
from endistill_jax.extras import require
from endistill_jax.storage import is_remote, stored_path

_READING = "reading a task's text"

tf = require("tensorflow", _READING)
seqio = require("seqio", _READING)
tfds = require("tensorflow_datasets", _READING)


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


def read_prepared_from(folder: str) -> None:
    """Says where prepared data are, for all tasks that read through TensorFlow Datasets, in place of `$TFDS_DATA_DIR`.

    Args:
      folder: a local folder, or one of a bucket.

    Raises:
      UserError: no such folder here, or another kind of storage.
    """
    path = stored_path(folder)
    if not is_remote(path) and not path.is_dir():
        raise UserError(f"jobs.run.data_dir is {folder}, which is no folder; give the one where data were prepared")
    seqio.set_tfds_data_dir_override(str(path))


def check_prepared(task: seqio.Task | seqio.Mixture) -> None:
    """Checks that TensorFlow Datasets would not have to download and prepare anything for a task.

    Raises:
      UserError: naming what is not prepared, and where it was looked for.
    """
    for each in task.tasks if isinstance(task, seqio.Mixture) else [task]:
        if not isinstance(each.source, seqio.TfdsDataSource):
            continue
        builder = each.source.tfds_dataset.builder
        if not builder.is_prepared():
            raise UserError(
                f"{builder.info.full_name}, which task {each.name} reads, is not prepared in {builder.data_path}, and "
                "each of the hosts would prepare it for itself; prepare it once, and give its folder as DATA_DIR or "
                "jobs.run.data_dir"
            )


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
