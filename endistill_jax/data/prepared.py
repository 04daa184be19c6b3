"""The data that TensorFlow Datasets has prepared: where they are, and whether they are there."""

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import seqio
from endistill_jax.storage import is_remote, stored_path


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
