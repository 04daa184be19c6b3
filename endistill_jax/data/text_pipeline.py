"""SeqIO's tasks: found by name, checked, and their texts.

SeqIO and TensorFlow are imported here for the whole package, so that where they are missing, whoever reads tasks says
so in one line.
"""

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


def resolve_task(task: str | seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name; one that is given as an object is returned as it is."""
    # TensorFlow would take the memory of every GPU, which JAX needs. It can be kept off them only before its first
    # operation, and whoever reads examples comes here first.
    tf.config.set_visible_devices([], "GPU")
    if not isinstance(task, str):
        return task
    # Importing a module registers its tasks, so a new file in the folder needs no entry anywhere.
    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"{tasks.__name__}.{module.name}")
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if task not in known:
        similar = difflib.get_close_matches(task, known, n=3, cutoff=0.5) or known
        raise UserError(f"no task or mixture named {task!r}; there is {', '.join(similar)}")
    return seqio.get_mixture_or_task(task)


def check_split(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Checks that a task, or any task of a mixture, has a split; reads no example."""
    splits = sorted({str(each) for each in task.splits})
    if split not in splits:
        raise UserError(f"task {task.name} has no split {split!r}; it has {', '.join(splits)}")


def read_prepared_from(folder: str) -> None:
    """Makes all tasks read what TensorFlow Datasets prepared in this folder, local or gs://, not `$TFDS_DATA_DIR`."""
    path = stored_path(folder)
    if not is_remote(path) and not path.is_dir():
        raise UserError(f"jobs.run.data_dir is {folder}, which is no folder; give the one where data were prepared")
    seqio.set_tfds_data_dir_override(str(path))


def check_prepared(task: seqio.Task | seqio.Mixture) -> None:
    """Checks that TensorFlow Datasets would not have to download and prepare anything for a task."""
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
    """The plain texts of a split, in a fixed order: what a vocabulary is trained on.

    Mistakes are found in the call, before the first text is read.

    Args:
        source: a SeqIO source, or a task (or its name), whose source is read.
        split: split of the source.
        text_field: string feature of the source's examples.
        max_documents: at most so many; None reads all.
    """
    if not isinstance(source, seqio.DataSource):
        task = resolve_task(source)
        if isinstance(task, seqio.Mixture):
            raise UserError(f"{task.name} is a mixture; name one of its tasks: {', '.join(t.name for t in task.tasks)}")
        source = task.source
    if split not in source.splits:
        raise UserError(f"the source has no split {split!r}; it has {', '.join(sorted(source.splits))}")
    return _texts(source, split, text_field, -1 if max_documents is None else max_documents)


def _texts(source: seqio.DataSource, split: str, text_field: str, count: int) -> Iterator[str]:
    dataset = source.get_dataset(split=split, shuffle=False)
    if text_field not in dataset.element_spec:
        raise UserError(f"the source's examples have no {text_field!r}; they have {', '.join(dataset.element_spec)}")
    for example in dataset.take(count).as_numpy_iterator():
        yield example[text_field].decode("utf-8", errors="replace")
