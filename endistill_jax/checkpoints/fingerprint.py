"""Content fingerprints of weights and vocabularies, independent of where they are stored.

A checkpoint records the fingerprints of its teacher and vocabulary, so that a run is never resumed with different ones.
Equal sizes or paths prove nothing; only the content is compared.
"""

import hashlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from endistill_jax.core.errors import UserError

_BLOCK = 1 << 22  # elements looked at together
# SentencePiece models hold sentinels as words of their own, tokenizer.json without the mark of a word's beginning.
_SENTINEL = re.compile(r"▁?(<extra_id_\d+>)")
# SeqIO's vocabularies, and our tokenizers of the same content. By class name: importing SeqIO would load TensorFlow.
_KINDS = {
    "SentencePieceVocabulary": "SentencePieceVocabulary",
    "SentencePieceTokenizer": "SentencePieceVocabulary",
    "ByteVocabulary": "ByteVocabulary",
    "ByteTokenizer": "ByteVocabulary",
    "PassThroughVocabulary": "PassThroughVocabulary",
}


def fingerprint_params(params: Mapping[str, Any]) -> str:
    """A SHA-256 of the weights: independent of the order of dictionaries and of how layers are laid out.

    Every leaf is hashed under its interchange name (`encoder/layers_0/attention/query/kernel`) with its shape and its
    values. Floats of up to 32 bits count as float32, so bfloat16 weights and the same weights widened to float32 are
    equal. One leaf (one layer of a stacked leaf) is on the host at a time; arrays that span several processes are
    gathered, so every process must call this.
    """
    digests = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        if "layers" not in path:
            digests["/".join(path)] = digest_tensor(leaf)
            continue
        for index in range(leaf.shape[0]):  # the first axis is that of the layers
            name = "/".join(f"layers_{index}" if part == "layers" else part for part in path)
            digests[name] = digest_tensor(leaf[index])
    return combine_digests(digests)


def digest_tensor(tensor: Any) -> str:
    """What `fingerprint_params` hashes of one tensor: its shape and its values, a block at a time."""
    if isinstance(tensor, jax.Array) and not tensor.is_fully_addressable:
        tensor = multihost_utils.process_allgather(tensor, tiled=True)
    array = np.asarray(tensor)
    small_float = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize <= 4
    dtype = np.dtype("<f4") if small_float else array.dtype.newbyteorder("<")
    # A transposed or narrow tensor is copied, but not as a whole.
    contents = (np.ascontiguousarray(block, dtype).data for block in row_blocks(array))
    return _sha256(itertools.chain([f"{dtype.str} {array.shape} ".encode()], contents))


def row_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array as views of some of its rows each, so that what is computed of it needs little memory at a time."""
    rows = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array) if array.ndim else 1, rows):
        yield array[start : start + rows] if array.ndim else array


def combine_digests(digests: Mapping[str, str]) -> str:
    """The fingerprint of a model from its tensors' digests by interchange name."""
    return _sha256(f"{name} {digests[name]}\n".encode() for name in sorted(digests))


def fingerprint_vocabulary(vocabulary: Any) -> str:
    """A SHA-256 of everything that decides how text becomes ids.

    For SentencePiece: each piece with its id, score and kind (the extra ids are pieces too), and the normalization
    rules. For bytes: the number of extra ids.

    Args:
        vocabulary: SeqIO's `SentencePieceVocabulary`, `ByteVocabulary` or `PassThroughVocabulary`, or a `Tokenizer`.
    """
    names = [kind.__name__ for kind in type(vocabulary).__mro__]
    kind = next((_KINDS[name] for name in names if name in _KINDS), None)
    if kind is None:
        raise UserError(f"vocabulary is a {names[0]}, whose content cannot be compared; use {', '.join(_KINDS)}")
    sizes = {"kind": kind, "ids": int(vocabulary.vocab_size), "extra_ids": int(vocabulary.extra_ids)}
    content = [json.dumps(sizes, sort_keys=True).encode()]
    if kind != "SentencePieceVocabulary":
        return _sha256([*content, f"{vocabulary.eos_id} {vocabulary.unk_id}".encode()])
    model = _sentencepiece_proto(vocabulary.sp_model)
    for index, piece in enumerate(model.pieces):
        content.append(f"{index}\t{piece.piece}\t{piece.score!r}\t{piece.type}\n".encode())
    for name in ("precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        content.append(f"{name} {getattr(model.normalizer_spec, name)!r}\n".encode())
    return _sha256(content)


# --- Vocabularies compared piece by piece, for models that have only a tokenizer.json. ---
# transformers 5 saves no SentencePiece model. Its tokenizer.json has every piece with its id, which distinguishes
# vocabularies; its normalization rules cannot be compared with SentencePiece's.


def fingerprint_pieces(pieces: Iterable[str] | None) -> str | None:
    """A SHA-256 of pieces in their order, the spelling of sentinels aside; None of None."""
    if pieces is None:
        return None
    return _sha256([json.dumps([sentinel_name(piece) or piece for piece in pieces]).encode()])


def pieces_of_vocabulary(vocabulary: Any) -> list[str] | None:
    """The pieces of a SentencePiece vocabulary, SeqIO's or ours, in the order of their ids, its extra ids among them.

    None for other kinds, such as bytes. A file on a bucket is read.
    """
    content = getattr(vocabulary, "sp_model", None)
    return None if content is None else [piece.piece for piece in _sentencepiece_proto(content).pieces]


def pieces_of_json(path: pathlib.Path) -> list[str]:
    """The pieces of a tokenizer.json in the order of their ids.

    Sentinels count wherever the file lists them, other tokens that were added above the vocabulary do not.
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


def sentinel_name(piece: str) -> str | None:
    """`<extra_id_N>` if the piece is such a sentinel, in either spelling; else None."""
    match = _SENTINEL.fullmatch(piece)
    return match and match.group(1)


def own_sentinels(pieces: Sequence[str]) -> int:
    """How many sentinels a vocabulary ends with, as T5 orders them: `<extra_id_0>` has the highest id.

    mT5's end with a hundred.
    """
    count = 0
    while count < len(pieces) and sentinel_name(pieces[-1 - count]) == f"<extra_id_{count}>":
        count += 1
    return count


def _sentencepiece_proto(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(content)


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
