"""Vocabularies: SentencePiece models with T5's conventions, trained here or given, and bytes.

T5's conventions: padding 0, end of sequence 1, unknown 2, no begin; then the pieces; then the sentinels
`<extra_id_0>` ... `<extra_id_99>` in descending order, so that the first sentinel has the highest id. White space is
collapsed (line ends are lost), as in T5's public vocabulary, so that Hugging Face's `T5Tokenizer` gives the same ids.
"""

import io
import os
import pathlib
import string
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

import sentencepiece

from endistill_jax.checkpoints.tokenizer import (
    BYTES,
    EOS_ID,
    EXTRA_IDS,
    PAD_ID,
    UNK_ID,
    check_extra_ids,
    read_model,
    sentinel_ids,
)
from endistill_jax.core.errors import UserError
from endistill_jax.storage import is_remote

if TYPE_CHECKING:
    import seqio

__all__ = [
    "BUNDLED",
    "BYTES",
    "EXTRA_IDS",
    "bundled_vocabulary",
    "load_vocabulary",
    "padded_vocab_size",
    "sentinel_ids",
    "train_sentencepiece",
]

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "assets" / "python_docs" / "teacher" / "spiece.model"


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    *,
    size: int = 8000,
    character_coverage: float = 0.9999,
) -> None:
    """Trains a unigram SentencePiece model (Kudo 2018, arXiv 1804.10959) and writes it to `path` in one piece.

    The same texts in the same order give the same file. Printable ASCII is always covered; other characters as far as
    `character_coverage` asks, the rest becomes the unknown piece.

    Args:
      texts: documents; line ends count as spaces.
      path: file to write; its folder is created.
      size: number of pieces, the three special ones included and sentinels not.
      character_coverage: share of the characters of the text that get pieces of their own.

    Raises:
      UserError: no text, or a size that the text does not allow.
    """
    model = io.BytesIO()
    counted = _CollapsedTexts(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            character_coverage=character_coverage,
            required_chars="".join(c for c in string.printable if not c.isspace()),
            max_sentence_length=1 << 20,  # bytes; longer documents would be left out without a word
            num_threads=1,  # more threads add floating-point sums in another order
            minloglevel=2,
        )
    except RuntimeError as error:
        if not counted.number:
            raise UserError("no text to train a vocabulary on: the source gave no document") from None
        reason = str(error).splitlines()[-1].rsplit("] ", 1)[-1].strip()
        raise UserError(f"cannot train a vocabulary of {size} pieces on this text: {reason}") from None
    _write_atomically(pathlib.Path(path), model.getvalue())


def load_vocabulary(spec: str | os.PathLike[str], *, extra_ids: int = EXTRA_IDS) -> "seqio.Vocabulary":
    """The vocabulary that `spec` names: `bytes`, or the path of a SentencePiece model.

    A local file is checked at once; one on a bucket (`gs://...`) is read when it is first needed.

    Args:
      spec: `bytes` (UTF-8 bytes shifted by 3, as ByT5) or a path.
      extra_ids: number of sentinels that follow its own pieces; 0 for a model that ends with sentinels, as mT5's.

    Raises:
      UserError: no such file, not a SentencePiece model, special pieces that are not where T5 has them, or extra ids
        for a model with sentinels of its own.
    """
    check_extra_ids(extra_ids)
    from endistill_jax.data.text_pipeline import seqio

    if os.fspath(spec) == BYTES:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    path = os.path.expanduser(spec)
    if not is_remote(path):
        read_model(path, extra_ids)
    return seqio.SentencePieceVocabulary(path, extra_ids=extra_ids)


def bundled_vocabulary() -> "seqio.SentencePieceVocabulary":
    """The vocabulary of the offline corpus: 8,000 pieces trained on `python_docs/packages`, and 100 sentinels."""
    return load_vocabulary(BUNDLED)


def padded_vocab_size(vocabulary: "seqio.Vocabulary", multiple: int = 128) -> int:
    """Number of ids, sentinels included, rounded up so that embedding and logits split evenly over devices."""
    size = vocabulary.vocab_size
    return -(-size // multiple) * multiple


class _CollapsedTexts:
    """Texts with every run of white space made one space; counts those that are not empty."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.number = 0

    def __iter__(self):
        for text in self._texts:
            if collapsed := " ".join(text.split()):
                self.number += 1
                yield collapsed


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
