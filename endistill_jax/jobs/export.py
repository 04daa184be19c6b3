"""From a trained model to a folder that others load: `transformers`, or T5X."""

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.interchange import VocabularyFile
from endistill_jax.checkpoints.model_card import model_card
from endistill_jax.errors import UserError
from endistill_jax.jobs.models import TrainedModel, fingerprint_of, open_model

FORMATS = ("huggingface", "t5x", "t5x_scanned")
DTYPES = ("float32", "bfloat16")


def export(
    *,
    model: str,
    folder: str,
    format: str = "huggingface",
    vocabulary_file: str | None = None,
    extra_ids: int = 100,
    dtype: str = "float32",
    embedding_copies: bool = True,
    dry_run: bool = False,
) -> None:
    """Writes a trained model for other programs, whole or not at all.

    Args:
        model: the model directory of a run (its last checkpoint) or of an import, "bundled", a Hugging Face folder or
            a T5X checkpoint.
        folder: where. A Hugging Face folder must not exist, or be empty; a T5X folder receives `checkpoint_<step>`.
        format: "huggingface" (weights, tokenizer, model card), "t5x", or "t5x_scanned" (the layers of a stack in one
            array, as `scalable_t5` has them).
        vocabulary_file: SentencePiece model that becomes the tokenizer; None takes the one that lies beside the model.
        extra_ids: sentinels above the pieces of `vocabulary_file`.
        dtype: of the written tensors, float32 or bfloat16.
        embedding_copies: write the embedding under all names that loaders look for, not only as `shared.weight`.
        dry_run: print what would be done, and do nothing.

    Raises:
        UserError: if there is no such model, the folder is taken, or the vocabulary does not fit.
    """
    if format not in FORMATS:
        raise UserError(f"export.format is {format!r}; choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"export.dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    trained = open_model(model, dtype)  # a model that is written narrow is not held wide
    vocabulary = _vocabulary(trained, vocabulary_file, extra_ids)
    if dry_run:
        tokenizer = "no tokenizer" if vocabulary is None else f"tokenizer {vocabulary.path}"
        print(f"would write {model} to {folder} for {format}, in {dtype}, {tokenizer}:\n  {trained.config}")
        return
    if format == "huggingface":
        huggingface.save(
            folder,
            trained.params,
            trained.config,
            vocabulary,
            dtype,
            embedding_copies=embedding_copies,
            model_card=model_card(folder.rstrip("/").rpartition("/")[2], trained.config, trained.facts, trained.step),
        )
        if vocabulary is None:
            print("no vocabulary lies beside the model: the folder has no tokenizer; give one with vocabulary_file")
    else:
        t5x.save(
            folder, trained.params, trained.config, step=trained.step, dtype=dtype, scanned=format == "t5x_scanned"
        )
    print(f"wrote {folder}")


def _vocabulary(trained: TrainedModel, file: str | None, extra_ids: int) -> VocabularyFile | None:
    """What the user gives, if it is what the model was trained with; else what lies beside the model."""
    if file is None:
        return trained.vocabulary_file
    given = VocabularyFile(file, extra_ids)
    if trained.vocabulary not in (None, fingerprint_of(given)):
        raise UserError(
            f"{trained.source} was trained with another vocabulary than {file} with {extra_ids} extra ids; "
            "give its own, or leave vocabulary_file out"
        )
    return given
