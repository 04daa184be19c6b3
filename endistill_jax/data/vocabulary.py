"""Vocabularies: SentencePiece models with T5's conventions, trained here or given, and bytes.

The conventions are those of `checkpoints.tokenizer`. White space is collapsed (line ends are lost), as in T5's public
vocabulary, so that Hugging Face's `T5Tokenizer` gives the same ids.
"""

import io
import itertools
import os
import pathlib
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING

import sentencepiece

from endistill_jax.checkpoints.tokenizer import BYTES, EOS_ID, EXTRA_IDS, PAD_ID, UNK_ID, check_extra_ids, read_model
from endistill_jax.core.errors import UserError
from endistill_jax.reports.files import write_atomically
from endistill_jax.storage import is_remote

if TYPE_CHECKING:
    import seqio

BUNDLED = pathlib.Path(__file__).resolve().parent.parent / "assets" / "python_docs" / "teacher" / "spiece.model"


def train_sentencepiece(texts: Iterable[str], path: str | os.PathLike[str], *, size: int = 8000) -> None:
    """Trains a unigram SentencePiece model (Kudo 2018, arXiv 1804.10959) and writes it to `path` in one piece.

    The same texts in the same order give the same file. Printable ASCII is always covered, and of other characters all
    but the rarest, which become the unknown piece. Line ends count as spaces. `size` is the number of pieces, the three
    special ones included and sentinels not.
    """
    lines = filter(None, (" ".join(text.split()) for text in texts))
    first = next(lines, None)
    if first is None:
        raise UserError("no text to train a vocabulary on: the source gave no document")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            character_coverage=0.9999,
            required_chars="".join(c for c in string.printable if not c.isspace()),
            max_sentence_length=1 << 20,  # bytes; longer documents would be left out without a word
            num_threads=1,  # more threads add floating-point sums in another order
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rsplit("] ", 1)[-1].strip()
        raise UserError(f"cannot train a vocabulary of {size} pieces on this text: {reason}") from None
    write_atomically(path, model.getvalue())


def load_vocabulary(spec: str | os.PathLike[str], *, extra_ids: int = EXTRA_IDS) -> "seqio.Vocabulary":
    """The vocabulary that `spec` names: `bytes`, or the path of a SentencePiece model.

    A local file is checked at once; one on a bucket (`gs://...`) is read when it is first needed.

    Args:
        spec: `bytes` (UTF-8 bytes shifted by 3, as ByT5) or a path.
        extra_ids: number of sentinels that follow its own pieces; 0 for a model that ends with sentinels, as mT5's.
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
