"""Training a SentencePiece vocabulary on the texts of a SeqIO source or task."""

from typing import TYPE_CHECKING, Union

from endistill_jax.core.errors import UserError
from endistill_jax.multihost import require_one_process
from endistill_jax.storage import local_path

if TYPE_CHECKING:
    import seqio


def train_vocabulary(
    *,
    source: Union["seqio.DataSource", "seqio.Task", str],
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
        source: where the texts come from: a SeqIO source, or a task (or its name), whose source is read.
        path: the model file to write; must not exist yet.
        size: number of pieces.
        split: split of the source.
        text_field: feature of the source's examples that holds the text.
        max_documents: read at most so many texts.
        dry_run: print what would be done, and do nothing.
    """
    require_one_process("train_vocabulary")
    from endistill_jax.data.text_pipeline import read_texts
    from endistill_jax.data.vocabulary import train_sentencepiece

    if local_path(path, "write to a local file and copy it with 'gcloud storage cp'").exists():
        raise UserError(f"{path} exists already; a vocabulary is never overwritten, give another path")
    texts = read_texts(source, split=split, text_field=text_field, max_documents=max_documents)
    if dry_run:
        print(f"would train {size} pieces on {text_field!r} of split {split!r} of {source} and write {path}")
        return
    train_sentencepiece(texts, path, size=size)
    print(f"wrote {path}: {size} pieces")
