"""The files of a T5 tokenizer: a SentencePiece model, and the number of sentinels after its pieces."""

import json
import pathlib
import re
from typing import Any

import sentencepiece
from etils import epath

from endistill_jax.checkpoints.huggingface.git_lfs import refuse_pointer
from endistill_jax.checkpoints.interchange import VocabularyFile
from endistill_jax.checkpoints.pieces import (
    fingerprint_pieces,
    own_sentinels,
    pieces_of_json,
    sentinel_name,
)
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig

_MODEL = "spiece.model"
_SETTINGS = "tokenizer_config.json"
_PIECES = "tokenizer.json"
_SENTINEL = re.compile(r"<extra_id_\d+>")
_DEFAULT_EXTRA_IDS = 100  # of transformers' T5Tokenizer


def vocabulary_of(folder: pathlib.Path) -> VocabularyFile | None:
    """The SentencePiece model of a folder; None if it has none, as ByT5's have.

    Raises:
        UserError: if the tokenizer's files are damaged.
    """
    model = folder / _MODEL
    if not model.is_file():
        return None
    settings, text = {}, ""
    for name in (_SETTINGS, _PIECES):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            settings = _parsed(folder / name, text)
            break
    if isinstance(settings.get("extra_ids"), int):
        return VocabularyFile(str(model), settings["extra_ids"])
    # Versions of transformers list the sentinels under several names; a vocabulary may also hold pieces called so.
    pieces = _pieces(str(model))
    listed = set(_SENTINEL.findall(text)) - {sentinel_name(piece) for piece in pieces}
    return VocabularyFile(str(model), len(listed) or (0 if own_sentinels(pieces) else _DEFAULT_EXTRA_IDS))


def fingerprint_of_pieces(folder: pathlib.Path) -> str | None:
    """The fingerprint of the pieces in a folder's tokenizer.json; None if it has no such file.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / _PIECES
    if not path.is_file():
        return None
    refuse_pointer(path)
    return fingerprint_pieces(pieces_of_json(path))


def check_vocabulary(vocabulary: VocabularyFile, config: ModelConfig) -> None:
    """Checks that a vocabulary can go with a model.

    Raises:
        UserError: if there is no such file, it is no SentencePiece model, its ids of padding and end are not the
            model's (of T5: its pad, eos and unknown ids are not 0, 1 and 2), or it has more ids than the model has
            embeddings.
    """
    processor = _processor(vocabulary.path)
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if (config.pad_id, config.eos_id) == (0, 1):
        if special != (0, 1, 2):
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
    """Copies the vocabulary as spiece.model and writes the two JSON files next to it."""
    processor = _processor(vocabulary.path)
    pad, eos, unk = map(processor.id_to_piece, (pad_id, processor.eos_id(), processor.unk_id()))
    sentinels = [f"<extra_id_{index}>" for index in range(vocabulary.extra_ids)]
    special = {"eos_token": eos, "unk_token": unk, "pad_token": pad, "additional_special_tokens": sentinels}
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": vocabulary.extra_ids,
        "model_max_length": 512,
        **special,
    }
    (folder / _MODEL).write_bytes(_path(vocabulary.path).read_bytes())
    for name, content in ((_SETTINGS, settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parsed(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    return parsed if isinstance(parsed, dict) else {}


def _pieces(path: str) -> list[str]:
    processor = _processor(path)
    return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]


def _path(file: str) -> epath.Path:
    return epath.Path(file).expanduser()  # it may be in a bucket


def _processor(file: str) -> sentencepiece.SentencePieceProcessor:
    path = _path(file)
    if not path.exists():
        raise UserError(f"{file} is not there; give a SentencePiece model file")
    refuse_pointer(path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{file} is not a SentencePiece model") from error
    return processor
