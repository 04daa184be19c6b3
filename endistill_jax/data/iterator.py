"""Iterators over numpy batches whose position can be saved and restored exactly."""

import io
import json
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

from endistill_jax.core.errors import UserError
from endistill_jax.data.text_pipeline import tf

_HEADER = "settings.json"
_CHECKPOINT = "iterator"


class BatchIterator:
    """Numpy batches of a dataset, in an order that its state fixes.

    The state is the dataset's own (positions in files, shuffle buffers, random streams), not a count of batches, so
    restoring costs no re-reading, and the batches after it are the same bit for bit.
    """

    def __init__(self, make_dataset: Callable[[], tf.data.Dataset], settings: Mapping[str, object]):
        """Iterates over a dataset that `make_dataset` makes, always the same one.

        Its order must not rest on a shuffle that starts again every epoch (`dataset.shuffle(...).repeat()`): tf.data
        does not save which epoch such a shuffle is in. A shuffle after the repetition is saved.

        Args:
          make_dataset: called now, and again to restore.
          settings: JSON values that a restored state must agree with.
        """
        self._settings = json.loads(json.dumps(dict(settings)))
        self._make_dataset = make_dataset
        self._iterator = iter(make_dataset())

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          StopIteration: a finite dataset is at its end.
          UserError: a reader found a mistake in the user's data, or a stream that should not end gave no batch.
        """
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
            _add(archive, _HEADER, json.dumps(self._settings, sort_keys=True).encode())
            for path in sorted(pathlib.Path(folder).iterdir()):
                _add(archive, path.name, path.read_bytes())
        return content.getvalue()

    def restore(self, state: bytes) -> None:
        """Goes to the position that `state` describes.

        Raises:
          UserError: the state is of an iterator with other settings (each difference is named), or is none at all.
        """
        try:
            archive = zipfile.ZipFile(io.BytesIO(state))
            saved = json.loads(archive.read(_HEADER))
        except (zipfile.BadZipFile, KeyError):
            raise UserError("this is not the state of a batch iterator") from None
        differences = [
            f"{name} was {saved.get(name)!r} and is {self._settings.get(name)!r}"
            for name in sorted(saved.keys() | self._settings.keys())
            if saved.get(name) != self._settings.get(name)
        ]
        if differences:
            raise UserError(f"the data differ from those of the saved state: {'; '.join(differences)}")
        # A used iterator keeps what an untouched one has not saved, such as a filled shuffle buffer.
        self._iterator = iter(self._make_dataset())
        with tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder)
            checkpoint = tf.train.Checkpoint(iterator=self._iterator)
            checkpoint.read(str(pathlib.Path(folder) / _CHECKPOINT)).assert_existing_objects_matched()


class ShardedIterator:
    """A host's rows of global batches, which come from one shard of a stream or from several."""

    def __init__(self, shards: Mapping[str, tuple[BatchIterator, slice]]):
        """Goes over the shards in step.

        Args:
          shards: by name and in the order of their rows: each one's batches, and which rows of them this host takes.
        """
        self._shards = dict(shards)

    @property
    def names(self) -> tuple[str, ...]:
        """The shards that this host reads."""
        return tuple(self._shards)

    def __iter__(self) -> "ShardedIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch; see `BatchIterator`."""
        parts = [(next(iterator), rows) for iterator, rows in self._shards.values()]
        return {name: np.concatenate([part[name][rows] for part, rows in parts]) for name in parts[0][0]}

    def state(self) -> dict[str, bytes]:
        """Position by shard, of those whose first rows are this host's: of all hosts together, each shard once."""
        return {name: iterator.state() for name, (iterator, rows) in self._shards.items() if rows.start == 0}

    def restore(self, states: Mapping[str, bytes]) -> None:
        """Goes to the positions of the shards by `names`.

        Raises:
          UserError: a state is missing, is of other settings (each difference is named), or is none at all.
        """
        if missing := [name for name in self.names if name not in states]:
            raise UserError(f"no state of the data {', '.join(missing)}, only of {', '.join(states) or 'none'}")
        for name, (iterator, _) in self._shards.items():
            iterator.restore(states[name])


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    # A bare ZipInfo has a fixed date: equal states are equal bytes.
    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=1)
