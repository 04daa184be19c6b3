"""SeqIO task to host-local numpy batches."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from endistill_jax.data.iterator import BatchIterator
from endistill_jax.data.registry import resolve_task
from endistill_jax.errors import UserError


def make_iterator(
    task: str | seqio.Task | seqio.Mixture,
    *,
    split: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    pack: bool = True,
    shuffle: bool = True,
    shuffle_buffer: int = 2048,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Batches of a task's split with SeqIO's encoder-decoder features, int32, padded with 0.

    Args:
      task: a task or mixture, or its registered name.
      split: such as `train` or `validation`.
      task_feature_lengths: lengths of `inputs` and `targets`.
      batch_size: global; every process gets its own `batch_size / process_count` rows.
      seed: decides order and corruption. The same arguments give the same batches.
      pack: whether several short examples share a row (adds segment ids and positions).
      shuffle: whether examples are shuffled, within a buffer and anew every epoch. Files are read in their own order,
        sixteen at a time.
      shuffle_buffer: examples in that buffer. They are part of the state, and must be there before the first batch.
      repeat: True for training: an endless stream, every epoch corrupted anew; each process reads its own share of the
        source, and no text of another. False for evaluation: one pass; every process walks through all of it and
        keeps its rows of each global batch, so that all get equally many batches, and the last batch is filled up with
        rows of zeros (loss weight 0), so that no example is lost.
      process_index: this process.
      process_count: number of processes.

    Raises:
      UserError: no such task or split, or a batch that does not divide over the processes.
    """
    # TensorFlow would take the memory of every GPU it sees, which JAX needs.
    tf.config.set_visible_devices([], "GPU")
    task = resolve_task(task)
    if split not in task_splits(task):
        raise UserError(f"task {task.name} has no split {split!r}; it has {', '.join(sorted(task_splits(task)))}")
    if batch_size % process_count:
        raise UserError(f"batch_size {batch_size} does not divide over {process_count} processes")
    local_size = batch_size // process_count
    shards = seqio.ShardInfo(index=process_index, num_shards=process_count) if repeat and process_count > 1 else None

    def make_dataset() -> tf.data.Dataset:
        examples = task.get_dataset(
            sequence_length=dict(task_feature_lengths),
            split=split,
            # Sources keep their order of files. Which order a next epoch would have is not part of tf.data's saved
            # state once the files of this one are open, so shuffled files would come back in another order.
            shuffle=False,
            seed=seed,
            shard_info=shards,
            num_epochs=None if repeat else 1,
            try_in_mem_cache=False,  # a cache would go into every saved state
        )
        if shuffle:
            examples = examples.shuffle(shuffle_buffer, seed=seed)
        rows = seqio.EncDecFeatureConverter(pack=pack)(examples, task_feature_lengths=task_feature_lengths)
        if repeat:
            return _with_options(rows.batch(local_size, drop_remainder=True))
        batches = rows.batch(batch_size)
        return _with_options(_host_rows(batches, batch_size, process_index * local_size, local_size))

    settings = {
        "task": task.name,
        "split": split,
        "task_feature_lengths": dict(task_feature_lengths),
        "batch_size": batch_size,
        "seed": seed,
        "pack": pack,
        "shuffle_buffer": shuffle_buffer if shuffle else 0,
        "repeat": repeat,
        "process_index": process_index,
        "process_count": process_count,
    }
    return BatchIterator(make_dataset, settings)


def _host_rows(batches: tf.data.Dataset, batch_size: int, start: int, size: int) -> tf.data.Dataset:
    """One process's rows of global batches, the last of which is first filled up with zeros."""

    def rows_of(value: tf.Tensor) -> tf.Tensor:
        padded = tf.pad(value, [[0, batch_size - tf.shape(value)[0]], [0, 0]])  # [batch_size, length]
        return tf.ensure_shape(padded[start : start + size], [size, value.shape[1]])

    return batches.map(lambda batch: {name: rows_of(value) for name, value in batch.items()})


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # Readers call Python functions that keep nothing between calls, so there is no outside state to save.
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


def task_splits(task: seqio.Task | seqio.Mixture) -> set[str]:
    """Splits that a task, or any task of a mixture, has."""
    tasks = task.tasks if isinstance(task, seqio.Mixture) else [task]
    return {str(split) for each in tasks for split in each.splits}
