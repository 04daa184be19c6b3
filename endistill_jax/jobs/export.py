"""From a run's checkpoint to a folder that Hugging Face's `transformers` loads."""

from endistill_jax.checkpoints import huggingface
from endistill_jax.jobs.models import load_model


def export(
    *,
    model: str,
    folder: str,
    vocabulary_file: str | None = None,
    dtype: str = "float32",
    embedding_copies: bool = True,
    dry_run: bool = False,
) -> None:
    """Writes a trained model as a Hugging Face T5 folder, whole or not at all.

    Args:
        model: the model directory of a run (its last checkpoint), "bundled", or another Hugging Face folder.
        folder: where; must not exist, or be empty.
        vocabulary_file: SentencePiece model that becomes the folder's tokenizer, with 100 sentinels above its pieces.
        dtype: of the written tensors, float32 or bfloat16.
        embedding_copies: write the embedding under all names that loaders look for, not only as `shared.weight`.
        dry_run: print what would be done, and do nothing.

    Raises:
        UserError: if there is no such model, the folder is taken, or the vocabulary does not fit.
    """
    trained = load_model(model)
    if dry_run:
        print(f"would write {model} to {folder} in {dtype}:\n  {trained.config}")
        return
    huggingface.save(folder, trained.params, trained.config, vocabulary_file, dtype, embedding_copies=embedding_copies)
    print(f"wrote {folder}")
