"""Texts for a model from one file, line by line and by number: text or JSONL, plain or gzip. Needs no TensorFlow."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from endistill_jax.core.errors import UserError


class Line(NamedTuple):
    """One line of an input file; a bad one has no text but a problem, which names file and number.

    Numbers are from 1.
    """

    number: int
    text: str
    problem: str | None = None


class InputFile:
    """A file of texts: in `.jsonl` and `.json` every line is an object with the text in a field; `.gz` is unpacked."""

    def __init__(self, path: str | os.PathLike[str], *, field: str = "inputs"):
        self._path, self._field = epath.Path(path).expanduser(), field
        self._is_json = is_json(os.fspath(path))
        if not self._path.is_file():
            raise UserError(f"there is no file {path}")

    def identity(self) -> dict[str, str | int]:
        """What identifies the file: SHA-256 of its unpacked content, and its number of lines."""
        digest, lines = hashlib.sha256(), 0
        for line in self._raw_lines():
            digest.update(line)
            lines += 1
        return {"sha256": digest.hexdigest(), "lines": lines}

    def __iter__(self) -> Iterator[Line]:
        """Every line in order, bad ones too."""
        for number, raw in enumerate(self._raw_lines(), start=1):
            where = f"{self._path} line {number}"
            try:
                text = json_text(raw, self._field, where) if self._is_json else raw.decode("utf-8")
                text.encode("utf-8")  # JSON can hold one half of a surrogate pair
            except UserError as error:
                yield Line(number, "", str(error))
            except UnicodeDecodeError:
                yield Line(number, "", f"{where} is not UTF-8")
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                yield Line(number, "", f"{where} has {half}, half of a surrogate pair, which is no character")
            else:
                yield Line(number, text.strip()) if text.strip() else Line(number, "", f"{where} is empty")

    def _raw_lines(self) -> Iterator[bytes]:
        try:
            with self._path.open("rb") as file:
                yield from gzip.GzipFile(fileobj=file) if self._path.name.endswith(".gz") else file
        except (OSError, EOFError, zlib.error) as error:  # such as a gzip file that was cut off
            raise UserError(f"{self._path} cannot be read to its end: {error}") from None


def is_json(path: str) -> bool:
    """Whether a file is JSONL by its name."""
    return path.removesuffix(".gz").endswith((".jsonl", ".json"))


def json_text(line: bytes, field: str, where: str) -> str:
    """The text in one line of JSONL; an empty line has none. `where` names the line in errors."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object")
    if not isinstance(record.get(field), str):
        raise UserError(f"{where} has no string in field {field!r}; its fields are {', '.join(map(repr, record))}")
    return record[field]
