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

import sentencepiece
import seqio

from endistill_jax.checkpoints.pieces import own_sentinels, pieces_of_vocabulary
from endistill_jax.core.errors import UserError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
EXTRA_IDS = 100
BYTES = "bytes"
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


def load_vocabulary(spec: str | os.PathLike[str], *, extra_ids: int = EXTRA_IDS) -> seqio.Vocabulary:
    """The vocabulary that `spec` names: `bytes`, or the path of a SentencePiece model.

    A local file is checked at once; one on a bucket (`gs://...`) is read when it is first needed.

    Args:
      spec: `bytes` (UTF-8 bytes shifted by 3, as ByT5) or a path.
      extra_ids: number of sentinels that follow its own pieces; 0 for a model that ends with sentinels, as mT5's.

    Raises:
      UserError: no such file, not a SentencePiece model, special pieces that are not where T5 has them, or extra ids
        for a model with sentinels of its own.
    """
    if not isinstance(extra_ids, int) or extra_ids < 0:
        raise UserError(f"extra_ids is {extra_ids!r}; give the number of sentinels, such as 100, or 0")
    if os.fspath(spec) == BYTES:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    if "://" not in os.fspath(spec):
        _check_model(pathlib.Path(spec), extra_ids)
    return seqio.SentencePieceVocabulary(os.fspath(spec), extra_ids=extra_ids)


def bundled_vocabulary() -> seqio.SentencePieceVocabulary:
    """The vocabulary of the offline corpus: 8,000 pieces trained on `python_docs/packages`, and 100 sentinels."""
    return load_vocabulary(BUNDLED)


def sentinel_ids(vocabulary: seqio.Vocabulary) -> range:
    """The ids of the sentinels, the last of a vocabulary: its extra ids, or, without any, what its model ends with."""
    count = vocabulary.extra_ids or own_sentinels(pieces_of_vocabulary(vocabulary) or ())
    return range(vocabulary.vocab_size - count, vocabulary.vocab_size)


def padded_vocab_size(vocabulary: seqio.Vocabulary, multiple: int = 128) -> int:
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


def _check_model(path: pathlib.Path, extra_ids: int) -> None:
    if not path.is_file():
        raise UserError(f"no vocabulary file at {path}; give a SentencePiece model or {BYTES!r}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        specials = (processor.pad_id(), processor.eos_id(), processor.unk_id())
    except (RuntimeError, TypeError):
        raise UserError(f"{path} is not a SentencePiece model") from None
    if specials != (PAD_ID, EOS_ID, UNK_ID):
        raise UserError(
            f"{path} has padding, end and unknown at ids {specials}; T5's models have {(PAD_ID, EOS_ID, UNK_ID)}"
        )
    own = own_sentinels([processor.id_to_piece(index) for index in range(processor.get_piece_size())])
    if own and extra_ids:
        raise UserError(f"{path} ends with {own} sentinels of its own, as mT5's does; set extra_ids to 0")


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
