"""Training a SentencePiece vocabulary from the texts of a SeqIO source."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from endistill_jax.errors import UserError

if TYPE_CHECKING:
    import seqio


def train_vocabulary(
    *,
    source: "seqio.DataSource",
    path: str,
    size: int = 8000,
    split: str = "train",
    text_field: str = "text",
    max_documents: int | None = None,
    dry_run: bool = False,
) -> None:
    """Trains a unigram SentencePiece model with T5's special pieces and writes it to `path`.

    Sentinels are not part of the file: a task adds them (100 by default) above its pieces.

    Args:
        source: where the texts come from.
        path: the model file to write; must not exist yet.
        size: number of pieces.
        split: split of the source.
        text_field: feature of the source's examples that holds the text.
        max_documents: read at most so many texts.
        dry_run: print what would be done, and do nothing.

    Raises:
        UserError: if the file exists, there is no such split, or the texts do not allow so many pieces.
    """
    import pathlib

    from endistill_jax.data.vocabulary import train_sentencepiece

    if pathlib.Path(path).exists():
        raise UserError(f"{path} exists already; a vocabulary is never overwritten, give another path")
    if split not in source.splits:
        raise UserError(f"the source has no split {split!r}; it has {', '.join(sorted(source.splits))}")
    if dry_run:
        print(f"would train {size} pieces on {text_field!r} of split {split!r} of {source} and write {path}")
        return
    train_sentencepiece(_texts(source, split, text_field, max_documents), path, size=size)
    print(f"wrote {path}: {size} pieces")


def _texts(source: "seqio.DataSource", split: str, text_field: str, limit: int | None) -> Iterator[str]:
    dataset = source.get_dataset(split, shuffle=False)
    if text_field not in dataset.element_spec:
        raise UserError(f"the source's examples have no {text_field!r}; they have {', '.join(dataset.element_spec)}")
    for example in (dataset if limit is None else dataset.take(limit)).as_numpy_iterator():
        yield example[text_field].decode()
