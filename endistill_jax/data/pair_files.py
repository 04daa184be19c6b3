"""SeqIO source of several text fields of the user's own JSONL files, plain or gzip, found by glob."""

import functools
from collections.abc import Mapping, Sequence

from endistill_jax.core.errors import UserError
from endistill_jax.data.input_lines import json_text
from endistill_jax.data.text_files import matching_files, read_lines
from endistill_jax.data.text_pipeline import seqio, tf


class PairFilesSource(seqio.FileDataSource):
    """Examples of strings by field name, one of each line that is not empty.

    Args:
      files: glob or globs of the files of each split.
      fields: fields of the JSON objects; each line must have all of them, as strings.

    Raises:
      UserError: no split, a glob that matches no file, or a file that is not JSONL by its name.
    """

    def __init__(self, files: Mapping[str, str | Sequence[str]], fields: tuple[str, ...]):
        found = {split: matching_files(globs) for split, globs in files.items()}
        if not found:
            raise UserError("no files are given; name the files of one split at least, such as train")
        for path in (path for paths in found.values() for path in paths):
            if not path.removesuffix(".gz").endswith((".jsonl", ".json")):
                raise UserError(f"{path} is not JSONL; the files end in .jsonl or .json, or these and .gz")
        self._settings = ({split: files[split] for split in sorted(files)}, fields)
        super().__init__(functools.partial(_read_pairs, fields=fields), found)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._settings}"

    def list_shards(self, split: str) -> Sequence[str]:
        return self._split_to_filepattern[split]


def _read_pairs(path: tf.Tensor, *, fields: tuple[str, ...]) -> tf.data.Dataset:
    def parse(path: bytes, number: int, line: bytes) -> list[bytes]:
        where = f"{path.decode()} line {number}"
        return [json_text(line, field, where).encode("utf-8", errors="replace") for field in fields]

    def example(number: tf.Tensor, line: tf.Tensor) -> dict[str, tf.Tensor]:
        texts = tf.numpy_function(parse, [path, number, line], [tf.string] * len(fields), stateful=False)
        return {field: tf.ensure_shape(text, []) for field, text in zip(fields, texts, strict=True)}

    lines = read_lines(path).enumerate(1)
    return lines.filter(lambda _, line: tf.strings.length(tf.strings.strip(line)) > 0).map(example)
