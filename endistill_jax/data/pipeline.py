"""SeqIO task to host-local numpy batches, by iterators whose position can be saved and restored exactly."""

import functools
import io
import json
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from endistill_jax.checkpoints.manifest import check_same
from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import check_prepared, check_split, resolve_task, seqio, tf
from endistill_jax.multihost import process_count

_HEADER = "settings.json"
_CHECKPOINT = "iterator"


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
    shards: int | None = None,
    part_index: int = 0,
    part_count: int = 1,
) -> "ShardedIterator":
    """Batches of a task's split with SeqIO's encoder-decoder features, int32, padded with 0.

    Global batches do not depend on how many hosts there are. A training stream is a number of shards of the source, and
    shard i gives the i-th of as many equal runs of rows of every global batch. A host reads the shards that its rows
    come from: one, where there are as many as hosts; several, where there are fewer hosts than shards; where there are
    more hosts, one that others read too, of which each keeps its own rows.

    Args:
        task: a task or mixture, or its registered name.
        task_feature_lengths: lengths of `inputs` and `targets`.
        batch_size: global; every host gets its own `batch_size / part_count` rows.
        seed: decides order and corruption. The same arguments give the same batches.
        pack: whether several short examples share a row (adds segment ids and positions).
        shuffle: whether examples are shuffled, within a buffer, again for every epoch. Files are read in their own
            order, sixteen at a time.
        shuffle_buffer: examples in that buffer. They are part of the state, and must be there before the first batch.
        repeat: True for training: an endless stream, newly corrupted each epoch. False for evaluation: one pass over
            one shard, the whole source; the last batch is filled up with rows of zeros (loss weight 0), so that no
            example is lost.
        shards: of a training stream, a part of what it is; as many as parts by default.
        part_index: which of the `part_count` parts of every batch is this host's; see `sharding.host_part`.
    """
    task = resolve_task(task)
    check_split(task, split)
    if process_count() > 1:
        check_prepared(task)
    shards = (shards or part_count) if repeat else 1
    for name, count in (("parts, one for each host", part_count), ("shards", shards)):
        if batch_size % count:
            raise UserError(f"batch_size {batch_size} does not divide over {count} {name}")

    def make_dataset(shard: int) -> tf.data.Dataset:
        examples = task.get_dataset(
            sequence_length=dict(task_feature_lengths),
            split=split,
            # Sources keep their order of files. Which order a next epoch would have is not part of tf.data's saved
            # state once the files of this one are open, so shuffled files would come back in another order.
            shuffle=False,
            seed=seed,
            shard_info=seqio.ShardInfo(index=shard, num_shards=shards) if shards > 1 else None,
            num_epochs=None if repeat else 1,
            try_in_mem_cache=False,  # a cache would go into every saved state
        )
        if shuffle:
            # After the repetition: tf.data saves the state of this shuffle, but not which epoch one that starts again
            # every epoch (`shuffle(...).repeat()`) is in.
            examples = examples.shuffle(shuffle_buffer, seed=seed)
        rows = seqio.EncDecFeatureConverter(pack=pack)(examples, task_feature_lengths=task_feature_lengths)
        batches = rows.batch(batch_size // shards, drop_remainder=repeat)
        return _with_options(batches if repeat else _filled_up(batches, batch_size))

    settings = {
        "task": task.name,
        "split": split,
        "task_feature_lengths": dict(task_feature_lengths),
        "batch_size": batch_size,
        "seed": seed,
        "pack": pack,
        "shuffle_buffer": shuffle_buffer if shuffle else 0,
        "repeat": repeat,
        "shards": shards,
    }
    iterators = {}
    part_size, shard_size = batch_size // part_count, batch_size // shards
    start, stop = part_index * part_size, (part_index + 1) * part_size
    for shard in range(start // shard_size, -(-stop // shard_size)):
        first = shard * shard_size
        rows = slice(max(start - first, 0), min(stop - first, shard_size))
        iterator = BatchIterator(functools.partial(make_dataset, shard), settings | {"shard": shard})
        iterators[f"shard_{shard}_of_{shards}"] = (iterator, rows)
    return ShardedIterator(iterators)


def _filled_up(batches: tf.data.Dataset, batch_size: int) -> tf.data.Dataset:
    """The last batch with rows of zeros up to `batch_size`."""

    def filled_up(value: tf.Tensor) -> tf.Tensor:
        padded = tf.pad(value, [[0, batch_size - tf.shape(value)[0]], [0, 0]])  # [batch_size, length]
        return tf.ensure_shape(padded, [batch_size, value.shape[1]])

    return batches.map(lambda batch: {name: filled_up(value) for name, value in batch.items()})


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # Readers call Python functions that keep nothing between calls, so there is no outside state to save.
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


class BatchIterator:
    """Numpy batches of a dataset, in an order that its state fixes.

    The state is the dataset's own (positions in files, shuffle buffers, random streams), not a count of batches, so
    restoring costs no re-reading, and the batches after it are the same bit for bit.

    Args:
        make_dataset: makes the same dataset every time: now, and to restore.
        settings: JSON values that a restored state must agree with.
    """

    def __init__(self, make_dataset: Callable[[], tf.data.Dataset], settings: Mapping[str, object]):
        self._settings = dict(settings)
        self._make_dataset = make_dataset
        self._iterator = iter(make_dataset())

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._settings.get("repeat"):
                raise UserError(
                    f"no example to train on in {self._settings['task']}, {self._settings['split']}"
                ) from None
            raise
        except tf.errors.OpError as error:
            # A reader's UserError arrives inside a TensorFlow error, as text.
            if found := re.search(r"UserError: (.*)", error.message):
                raise UserError(found[1].strip()) from None
            raise
        return {name: value.numpy() for name, value in batch.items()}

    def state(self) -> bytes:
        """Position after the last batch returned, for `restore` of an iterator made with the same settings."""
        content = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            tf.train.Checkpoint(iterator=self._iterator).write(str(pathlib.Path(folder) / _CHECKPOINT))
            files = {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}
            files = {_HEADER: json.dumps(self._settings, sort_keys=True).encode()} | files
            for name, data in files.items():
                # A bare ZipInfo has a fixed date: equal states are equal bytes.
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, compresslevel=1)
        return content.getvalue()

    def restore(self, state: bytes) -> None:
        """Goes to the position that `state` describes; refuses one of other settings, naming each difference."""
        try:
            archive = zipfile.ZipFile(io.BytesIO(state))
            saved = json.loads(archive.read(_HEADER))
        except (zipfile.BadZipFile, KeyError):
            raise UserError("this is not the state of a batch iterator") from None
        check_same(saved, self._settings, "the saved position in the data")
        # A used iterator keeps what an untouched one has not saved, such as a filled shuffle buffer.
        self._iterator = iter(self._make_dataset())
        with tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder)
            checkpoint = tf.train.Checkpoint(iterator=self._iterator)
            checkpoint.read(str(pathlib.Path(folder) / _CHECKPOINT)).assert_existing_objects_matched()


class ShardedIterator:
    """A host's rows of global batches, which come from one shard of a stream or from several, read in step.

    Args:
        shards: by name and in the order of their rows: each one's batches, and which rows of them this host takes.
    """

    def __init__(self, shards: Mapping[str, tuple[BatchIterator, slice]]):
        self._shards = dict(shards)

    @property
    def names(self) -> tuple[str, ...]:
        """The shards that this host reads."""
        return tuple(self._shards)

    def __iter__(self) -> "ShardedIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [(next(iterator), rows) for iterator, rows in self._shards.values()]
        return {name: np.concatenate([part[name][rows] for part, rows in parts]) for name in parts[0][0]}

    def state(self) -> dict[str, bytes]:
        """Position by shard, of those whose first rows are this host's: of all hosts together, each shard once."""
        return {name: iterator.state() for name, (iterator, rows) in self._shards.items() if rows.start == 0}

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Goes to the positions of the shards by `names`."""
        if missing := [name for name in self.names if name not in states]:
            raise UserError(f"no state of the data {', '.join(missing)}, only of {', '.join(states) or 'none'}")
        for name, (iterator, _) in self._shards.items():
            iterator.restore(states[name])
