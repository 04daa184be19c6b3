"""SeqIO sources of the user's own text and JSONL files, plain or gzip, found by glob."""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

from endistill_jax.core.errors import UserError
from endistill_jax.data.input_lines import is_json, json_text
from endistill_jax.data.text_pipeline import seqio, tf

_HELD_OUT_BUCKETS = 10_000

Documents = Literal["line", "blank_line"]


class _FilesSource(seqio.FileDataSource):
    """A source of files by split that is described, and so compared, by its settings; see `register_once`."""

    def __init__(self, read_file, files: Mapping[str, list[str]], settings: tuple[object, ...]):
        self._settings = settings
        super().__init__(read_file, files)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._settings}"

    def list_shards(self, split: str) -> Sequence[str]:
        return self._split_to_filepattern[split]


class TextFilesSource(_FilesSource):
    """Examples {"text": string} of text files and JSONL files (`.jsonl`, `.json`), each plain or gzip (`.gz`).

    In JSONL every line is an object and a document its field `field`. In text files every line is a document, or, with
    `documents="blank_line"`, every run of lines without an empty one. Empty documents are left out.

    Args:
        train: glob or globs of the training files.
        validation: of the validation files; without it, `validation` is a part of the training files' documents.
        field: field of the JSON objects that holds the text.
        documents: what a document of a text file is.
        held_out: the share of documents, chosen by content, that is held out where `validation` is not given.
    """

    def __init__(
        self,
        train: str | Sequence[str],
        validation: str | Sequence[str] | None = None,
        *,
        field: str = "text",
        documents: Documents = "line",
        held_out: float = 0.01,
    ):
        if documents not in ("line", "blank_line"):
            raise UserError(
                f"documents is {documents!r}; a document of a text file is a 'line' or ends at a 'blank_line'"
            )
        if not 0 <= held_out < 1:
            raise UserError(f"held_out is {held_out}; it is a share of the documents, such as 0.01")
        self._held_out_buckets = round(held_out * _HELD_OUT_BUCKETS) if validation is None else 0
        files = {"train": matching_files(train)}
        if validation is not None:
            files["validation"] = matching_files(validation)
        elif self._held_out_buckets:
            files["validation"] = files["train"]
        read_file = functools.partial(_read_documents, field=field, documents=documents)
        super().__init__(read_file, files, (train, validation, field, documents, held_out))

    def get_dataset(self, split: str = "train", *args, **kwargs) -> tf.data.Dataset:
        dataset = super().get_dataset(split, *args, **kwargs)
        if not self._held_out_buckets:
            return dataset

        def belongs(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
            bucket = tf.strings.to_hash_bucket_fast(example["text"], _HELD_OUT_BUCKETS)
            return (bucket < self._held_out_buckets) == (split == "validation")

        return dataset.filter(belongs)


class PairFilesSource(_FilesSource):
    """Examples of strings by field name, one of each line of JSONL files that is not empty.

    Args:
        files: glob or globs of the files of each split.
        fields: fields of the JSON objects; each line must have all of them, as strings.
    """

    def __init__(self, files: Mapping[str, str | Sequence[str]], fields: tuple[str, ...]):
        found = {split: matching_files(globs) for split, globs in files.items()}
        if not found:
            raise UserError("no files are given; name the files of one split at least, such as train")
        for path in (path for paths in found.values() for path in paths):
            if not is_json(path):
                raise UserError(f"{path} is not JSONL; the files end in .jsonl or .json, or these and .gz")
        settings = ({split: files[split] for split in sorted(files)}, fields)
        super().__init__(functools.partial(_read_pairs, fields=fields), found, settings)


def matching_files(globs: str | Sequence[str]) -> list[str]:
    """Files that match any of the globs, sorted, each once."""
    found = set()
    for glob in [globs] if isinstance(globs, str) else globs:
        matches = [path for path in tf.io.gfile.glob(glob) if not tf.io.gfile.isdir(path)]
        if not matches:
            raise UserError(f"no file matches {glob!r}; give a glob such as 'texts/*.jsonl.gz'")
        found.update(matches)
    return sorted(found)


def _read_documents(path: tf.Tensor, *, field: str, documents: Documents) -> tf.data.Dataset:
    """Documents of one file, its kind determined by its name. `path` is a scalar string."""
    lines = _read_lines(path)
    from_json = tf.strings.regex_full_match(path, r".*\.jsonl?(\.gz)?")
    # SeqIO traces this function before it knows the file's name, so the choice is the dataset's: one of the two is
    # empty.
    parsed = lines.enumerate(1).filter(lambda *_: from_json).map(lambda n, line: _parse_line(path, n, line, [field])[0])
    plain = lines.filter(lambda _: ~from_json)
    if documents == "blank_line":
        plain = _join_until_blank_line(plain)
    texts = parsed.concatenate(plain).map(tf.strings.strip)
    return texts.filter(lambda text: tf.strings.length(text) > 0).map(lambda text: {"text": text})


def _read_pairs(path: tf.Tensor, *, fields: tuple[str, ...]) -> tf.data.Dataset:
    def example(number: tf.Tensor, line: tf.Tensor) -> dict[str, tf.Tensor]:
        return dict(zip(fields, _parse_line(path, number, line, fields), strict=True))

    lines = _read_lines(path).enumerate(1)
    return lines.filter(lambda _, line: tf.strings.length(tf.strings.strip(line)) > 0).map(example)


def _read_lines(path: tf.Tensor) -> tf.data.Dataset:
    compression = tf.where(tf.strings.regex_full_match(path, r".*\.gz"), "GZIP", "")
    return tf.data.TextLineDataset(path, compression_type=compression)


def _join_until_blank_line(lines: tf.data.Dataset) -> tf.data.Dataset:
    def step(document: tf.Tensor, line: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        blank = tf.strings.length(tf.strings.strip(line)) == 0
        longer = tf.strings.join([document, line, "\n"])
        return tf.where(blank, "", longer), tf.where(blank, document, "")

    # The empty line at the end lets the last document out.
    ended = lines.concatenate(tf.data.Dataset.from_tensors(""))
    return ended.scan(tf.constant(""), step)


def _parse_line(path: tf.Tensor, number: tf.Tensor, line: tf.Tensor, fields: Sequence[str]) -> list[tf.Tensor]:
    """The texts of these fields, scalar strings, of line `number` of a JSONL file."""

    def parse(path: bytes, number: int, line: bytes) -> list[bytes]:
        where = f"{path.decode()} line {number}"
        return [json_text(line, field, where).encode("utf-8", errors="replace") for field in fields]

    texts = tf.numpy_function(parse, [path, number, line], [tf.string] * len(fields), stateful=False)
    return [tf.ensure_shape(text, []) for text in texts]
