"""Tokenizers that need no text pipeline, and their files: ids and fingerprints are those of SeqIO's vocabularies.

T5's conventions: padding 0, end of sequence 1, unknown 2, no begin; then the pieces; then the sentinels
`<extra_id_0>` ... `<extra_id_99>` in descending order, so that the first sentinel has the highest id.
"""

import abc
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sentencepiece

from endistill_jax.checkpoints.fingerprint import (
    fingerprint_pieces,
    own_sentinels,
    pieces_of_json,
    pieces_of_vocabulary,
    sentinel_name,
)
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig
from endistill_jax.storage import refuse_lfs_pointer, stored_path

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
EXTRA_IDS = 100  # T5's, and the default of transformers' T5Tokenizer
BYTES = "bytes"

# The files of a tokenizer in a Hugging Face folder.
_MODEL = "spiece.model"
_SETTINGS = "tokenizer_config.json"
_PIECES = "tokenizer.json"
_SENTINEL = re.compile(r"<extra_id_\d+>")


class VocabularyFile(NamedTuple):
    """A SentencePiece model stored with a checkpoint, and the number of sentinels above its own pieces."""

    path: str
    extra_ids: int


class Tokenizer(abc.ABC):
    """Text to ids and back; `vocab_size` counts the `extra_ids` sentinels above its own pieces."""

    extra_ids: int
    vocab_size: int
    pad_id: int = PAD_ID
    eos_id: int = EOS_ID
    unk_id: int = UNK_ID

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of sequence."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, up to the first end of sequence; an id outside the vocabulary counts as unknown."""
        kept = [int(index) for index in ids]
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id) + 1]
        return self._decode(kept)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A serialized SentencePiece model with sentinels above its pieces, as `seqio.SentencePieceVocabulary` has them.

    A sentinel is recognized at the beginning of a word only: its piece is `▁<extra_id_N>`.
    """

    def __init__(self, model: bytes, extra_ids: int = 0):
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        for index in reversed(range(extra_ids)):
            proto.pieces.add(piece=f"▁<extra_id_{index}>", score=0.0, type=user_defined)
        self.extra_ids = extra_ids
        self.sp_model = proto.SerializeToString()

    @functools.cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """SentencePiece's own object."""
        return sentencepiece.SentencePieceProcessor(model_proto=self.sp_model)

    @property
    def vocab_size(self) -> int:
        return self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode([index if index < self.vocab_size else self.unk_id for index in ids])


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes shifted by 3, as ByT5's: `seqio.ByteVocabulary`."""

    def __init__(self, extra_ids: int = 0):
        self.extra_ids = extra_ids
        self.vocab_size = 256 + 3 + extra_ids

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]

    def _decode(self, ids: list[int]) -> str:
        return bytes(index - 3 for index in ids if 3 <= index < 259).decode("utf-8", errors="ignore")


def load_tokenizer(spec: str | os.PathLike[str], *, extra_ids: int = EXTRA_IDS) -> Tokenizer:
    """The tokenizer that `spec` names: `bytes`, or the path of a SentencePiece model, local or gs://.

    `extra_ids` is the number of sentinels that follow its own pieces; 0 for a model that ends with sentinels, as mT5's.
    """
    check_extra_ids(extra_ids)
    if os.fspath(spec) == BYTES:
        return ByteTokenizer(extra_ids)
    return SentencePieceTokenizer(read_model(spec, extra_ids), extra_ids)


def check_extra_ids(extra_ids: Any) -> None:
    """Refuses what is no number of sentinels."""
    if not isinstance(extra_ids, int) or extra_ids < 0:
        raise UserError(f"extra_ids is {extra_ids!r}; give the number of sentinels, such as 100, or 0")


def read_model(spec: str | os.PathLike[str], extra_ids: int) -> bytes:
    """The content of a SentencePiece model, checked against T5's conventions."""
    content, processor = _open_model(spec)
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if special != (PAD_ID, EOS_ID, UNK_ID):
        raise UserError(
            f"{spec} has padding, end and unknown at ids {special}; T5's models have {(PAD_ID, EOS_ID, UNK_ID)}"
        )
    own = own_sentinels(_pieces(processor))
    if own and extra_ids:
        raise UserError(f"{spec} ends with {own} sentinels of its own, as mT5's does; set extra_ids to 0")
    return content


def sentinel_ids(vocabulary: Any) -> range:
    """The ids of the sentinels of a `Tokenizer` or one of SeqIO's vocabularies, that of `<extra_id_0>` last.

    They are its extra ids, or, without any, what its model ends with.
    """
    pieces: Sequence[str] = () if vocabulary.extra_ids else pieces_of_vocabulary(vocabulary) or ()
    count = vocabulary.extra_ids or own_sentinels(pieces)
    return range(vocabulary.vocab_size - count, vocabulary.vocab_size)


def vocabulary_of(folder: pathlib.Path) -> VocabularyFile | None:
    """The SentencePiece model of a Hugging Face folder; None if it has none, as ByT5's have."""
    model = folder / _MODEL
    if not model.is_file():
        return None
    settings, text = {}, ""
    for path in (folder / _SETTINGS, folder / _PIECES):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            try:
                settings = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path} is not valid JSON ({error})") from error
            break
    if isinstance(settings.get("extra_ids"), int):
        return VocabularyFile(str(model), settings["extra_ids"])
    # Versions of transformers list the sentinels under several names; a vocabulary may also hold pieces called so.
    pieces = _pieces(_open_model(model)[1])
    listed = set(_SENTINEL.findall(text)) - {sentinel_name(piece) for piece in pieces}
    return VocabularyFile(str(model), len(listed) or (0 if own_sentinels(pieces) else EXTRA_IDS))


def fingerprint_of_pieces(folder: pathlib.Path) -> str | None:
    """The fingerprint of the pieces in a folder's tokenizer.json; None if it has no such file."""
    path = folder / _PIECES
    if not path.is_file():
        return None
    refuse_lfs_pointer(path)
    return fingerprint_pieces(pieces_of_json(path))


def check_vocabulary(vocabulary: VocabularyFile, config: ModelConfig) -> None:
    """Checks that a vocabulary can go with a model: its ids of padding and end, and the number of ids."""
    _, processor = _open_model(vocabulary.path)
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if (config.pad_id, config.eos_id) == (PAD_ID, EOS_ID):
        if special != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(f"{vocabulary.path} has pad, eos and unknown ids {special}; T5's are (0, 1, 2)")
    elif special[1] != config.eos_id or special[0] not in (config.pad_id, -1):  # -1: it has none, and none is needed
        raise UserError(
            f"{vocabulary.path} has pad and eos ids {special[:2]}; the model's are {(config.pad_id, config.eos_id)}"
        )
    ids = processor.get_piece_size() + vocabulary.extra_ids
    if ids > config.vocab_size:
        raise UserError(
            f"{vocabulary.path} has {ids} ids ({vocabulary.extra_ids} of them extra) and the model only "
            f"{config.vocab_size}; give the vocabulary it was trained with"
        )


def write_tokenizer(folder: pathlib.Path, vocabulary: VocabularyFile, pad_id: int = 0) -> None:
    """Copies the vocabulary as spiece.model and writes transformers' two JSON files next to it."""
    content, processor = _open_model(vocabulary.path)
    pad, eos, unk = map(processor.id_to_piece, (pad_id, processor.eos_id(), processor.unk_id()))
    sentinels = [f"<extra_id_{index}>" for index in range(vocabulary.extra_ids)]
    special = {"eos_token": eos, "unk_token": unk, "pad_token": pad, "additional_special_tokens": sentinels}
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": vocabulary.extra_ids,
        "model_max_length": 512,
        **special,
    }
    (folder / _MODEL).write_bytes(content)
    for name, written in ((_SETTINGS, settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _open_model(file: str | os.PathLike[str]) -> tuple[bytes, sentencepiece.SentencePieceProcessor]:
    path = stored_path(file)
    if not path.is_file():
        raise UserError(f"no vocabulary file at {file}; give a SentencePiece model or {BYTES!r}")
    refuse_lfs_pointer(path)
    content = path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        raise UserError(f"{file} is not a SentencePiece model") from None
    return content, processor


def _pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
