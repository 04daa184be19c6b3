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
from jax.experimental import multihost_utils

from endistill_jax.core.errors import UserError

_BLOCK = 1 << 22  # elements looked at together


def fingerprint_params(params: Mapping[str, Any]) -> str:
    """A SHA-256 of the weights: independent of the order of dictionaries and of how layers are laid out.

    Every leaf is hashed under its interchange name (`encoder/layers_0/attention/query/kernel`) with its shape and its
    values. Floats of up to 32 bits count as float32, so bfloat16 weights and the same weights widened to float32 are
    equal. One leaf (one layer of a stacked leaf) is on the host at a time.

    Args:
        params: nested dictionary of NumPy or JAX arrays, layers stacked or not. Arrays that span several processes are
            gathered a layer at a time; every process must call this.

    Returns:
        64 hexadecimal digits.
    """
    return combine_digests({name: digest_tensor(leaf) for name, leaf in _interchange_leaves(params)})


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
    """A SHA-256 of everything that decides how text becomes ids: independent of where the vocabulary's file is stored.

    For SentencePiece: each piece with its id, score and kind (the extra ids are pieces too), and the normalization
    rules. For bytes: the number of extra ids.

    Args:
        vocabulary: a `seqio.SentencePieceVocabulary`, `seqio.ByteVocabulary` or `seqio.PassThroughVocabulary`, or the
            `Tokenizer` of the same content, which has the same fingerprint.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: for a kind of vocabulary whose content is not known here.
    """
    # Compared by class name: importing SeqIO for isinstance would load TensorFlow.
    names = (_SEQIO_NAMES.get(kind.__name__, kind.__name__) for kind in type(vocabulary).__mro__)
    kind = next((name for name in names if name in _CONTENTS), None)
    if kind is None:
        known = ", ".join(_CONTENTS)
        raise UserError(f"vocabulary is a {type(vocabulary).__name__}, whose content cannot be compared; use {known}")
    content = {"kind": kind, "ids": int(vocabulary.vocab_size), "extra_ids": int(vocabulary.extra_ids)}
    return _sha256([json.dumps(content, sort_keys=True).encode(), *_CONTENTS[kind](vocabulary)])


def _interchange_leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            yield from _interchange_leaves(value, here)
        elif "layers" in here:  # the first axis is theirs
            for index in range(value.shape[0]):
                yield "/".join(f"layers_{index}" if part == "layers" else part for part in here), value[index]
        else:
            yield "/".join(here), value


def _sentencepiece_content(vocabulary: Any) -> Iterator[bytes]:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary.sp_model)
    for index, piece in enumerate(model.pieces):
        yield f"{index}\t{piece.piece}\t{piece.score!r}\t{piece.type}\n".encode()
    rules = model.normalizer_spec
    for name in ("precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        yield f"{name} {getattr(rules, name)!r}\n".encode()


def _sizes_say_all(vocabulary: Any) -> Iterator[bytes]:
    yield f"{vocabulary.eos_id} {vocabulary.unk_id}".encode()


_CONTENTS = {
    "SentencePieceVocabulary": _sentencepiece_content,
    "ByteVocabulary": _sizes_say_all,
    "PassThroughVocabulary": _sizes_say_all,
}


# `checkpoints.tokenizer` has the same content without SeqIO.
_SEQIO_NAMES = {"SentencePieceTokenizer": "SentencePieceVocabulary", "ByteTokenizer": "ByteVocabulary"}


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


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
