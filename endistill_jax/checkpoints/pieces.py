"""Vocabularies compared piece by piece, for models that have only a tokenizer.json.

transformers 5 saves no SentencePiece model. Its tokenizer.json has every piece with its id, which distinguishes
vocabularies; its normalization rules cannot be compared with SentencePiece's.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from endistill_jax.core.errors import UserError

# SentencePiece models hold sentinels as words of their own, tokenizer.json without the mark of a word's beginning.
_SENTINEL = re.compile(r"▁?(<extra_id_\d+>)")


def sentinel_name(piece: str) -> str | None:
    """`<extra_id_N>` if the piece is such a sentinel, in either spelling; else None."""
    match = _SENTINEL.fullmatch(piece)
    return match and match.group(1)


def own_sentinels(pieces: Sequence[str]) -> int:
    """How many sentinels a vocabulary ends with, as T5 orders them: `<extra_id_0>` has the highest id.

    Args:
        pieces: all of them in the order of their ids, such as mT5's, which end with a hundred.
    """
    count = 0
    while count < len(pieces) and sentinel_name(pieces[-1 - count]) == f"<extra_id_{count}>":
        count += 1
    return count


def pieces_of_vocabulary(vocabulary: Any) -> list[str] | None:
    """The pieces of a SentencePiece vocabulary, SeqIO's or ours, in the order of their ids, its extra ids among them.

    None for other kinds, such as bytes. A file on a bucket is read.
    """
    content = getattr(vocabulary, "sp_model", None)
    if content is None:
        return None
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    return [piece.piece for piece in model.pieces]


def pieces_of_json(path: pathlib.Path) -> list[str]:
    """The pieces of a tokenizer.json in the order of their ids.

    Sentinels count wherever the file lists them, other tokens that were added above the vocabulary do not.

    Raises:
        UserError: if it is not a tokenizer.json.
    """
    try:
        content = json.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            pieces = {int(number): piece for piece, number in vocabulary.items()}
        else:
            pieces = {number: piece for number, (piece, _) in enumerate(vocabulary)}
        added = {int(token["id"]): token["content"] for token in content.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a valid tokenizer.json ({type(error).__name__}: {error})") from error
    above = {number: piece for number, piece in added.items() if number not in pieces}
    sentinels = [number for number, piece in above.items() if sentinel_name(piece)]
    size = max([*pieces, *sentinels], default=-1) + 1
    return [pieces.get(number, above.get(number, "")) for number in range(size)]


def fingerprint_pieces(pieces: Iterable[str] | None) -> str | None:
    """A SHA-256 of pieces in their order, the spelling of sentinels aside; None of None."""
    if pieces is None:
        return None
    content = json.dumps([sentinel_name(piece) or piece for piece in pieces])
    return hashlib.sha256(content.encode()).hexdigest()
