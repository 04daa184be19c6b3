"""The files that make `transformers.AutoTokenizer` read our SentencePiece vocabulary as a T5 tokenizer."""

import json
import pathlib
import shutil

import sentencepiece

from endistill_jax.errors import UserError


def check_vocabulary(vocabulary_file: str, extra_ids: int, vocab_size: int) -> None:
    """Makes sure that a vocabulary can go with a model.

    Raises:
        UserError: if there is no such file, it is no SentencePiece model, its pad, eos and unknown ids are not T5's
            0, 1 and 2, or it has more ids than the model has embeddings.
    """
    processor = _processor(vocabulary_file)
    special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    if special != (0, 1, 2):
        raise UserError(f"{vocabulary_file} has pad, eos and unknown ids {special}; T5's are (0, 1, 2)")
    ids = processor.get_piece_size() + extra_ids
    if ids > vocab_size:
        raise UserError(
            f"{vocabulary_file} has {ids} ids ({extra_ids} of them extra) and the model only {vocab_size}; "
            "give the vocabulary it was trained with"
        )


def write_tokenizer(folder: pathlib.Path, vocabulary_file: str, extra_ids: int) -> None:
    """Copies the vocabulary as spiece.model and writes the two JSON files beside it."""
    processor = _processor(vocabulary_file)
    pad, eos, unk = (processor.id_to_piece(index) for index in range(3))
    sentinels = [f"<extra_id_{index}>" for index in range(extra_ids)]
    special = {"eos_token": eos, "unk_token": unk, "pad_token": pad, "additional_special_tokens": sentinels}
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids, "model_max_length": 512, **special}
    shutil.copyfile(pathlib.Path(vocabulary_file).expanduser(), folder / "spiece.model")
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _processor(vocabulary_file: str) -> sentencepiece.SentencePieceProcessor:
    path = pathlib.Path(vocabulary_file).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not there; give a SentencePiece model file")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model") from error
    return processor
