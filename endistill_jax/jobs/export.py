"""From a trained model to a folder that others load: `transformers`, or T5X."""

import dataclasses

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.folder import check_free, local_folder
from endistill_jax.checkpoints.model_card import model_card
from endistill_jax.checkpoints.models import DTYPES, choose_vocabulary, open_model, print_notes
from endistill_jax.core.errors import UserError
from endistill_jax.multihost.initialize import require_one_process

FORMATS = ("huggingface", "t5x", "t5x_scanned")


def export(
    *,
    model: str,
    folder: str,
    format: str = "huggingface",
    vocabulary_file: str | None = None,
    extra_ids: int = 100,
    dtype: str = "float32",
    dropout_rate: float | None = None,
    embedding_copies: bool = True,
    dry_run: bool = False,
) -> None:
    """Writes a trained model for other programs, whole or not at all.

    Args:
        model: the model directory of a run or of an import (its last checkpoint) or `checkpoints/<step>` in it,
            "bundled", a Hugging Face folder or a T5X checkpoint.
        folder: where. A Hugging Face folder must not exist, or be empty; a T5X folder receives `checkpoint_<step>`.
        format: "huggingface" (weights, tokenizer, model card), "t5x", or "t5x_scanned" (the layers of a stack in one
            array, as `scalable_t5` has them).
        vocabulary_file: SentencePiece model that becomes the tokenizer; None takes the one that lies beside the model.
        extra_ids: sentinels above the pieces of `vocabulary_file`.
        dtype: of the written tensors, float32 or bfloat16.
        dropout_rate: written for whoever trains the model further; None keeps what it was trained with.
        embedding_copies: write the embedding under all names that loaders look for, not only as `shared.weight`.
        dry_run: print what would be done, and do nothing.

    Raises:
        UserError: if there is no such model, the folder is taken, or the vocabulary does not fit.
    """
    require_one_process("export")
    if format not in FORMATS:
        raise UserError(f"export.format is {format!r}; choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"export.dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    trained = open_model(model, dtype)  # a model that is written narrow is not held wide
    if dropout_rate is not None:
        trained.config = dataclasses.replace(trained.config, dropout_rate=dropout_rate)
    vocabulary = choose_vocabulary(trained, vocabulary_file, extra_ids)
    target = local_folder(folder)
    check_free(target if format == "huggingface" else target / f"checkpoint_{trained.step}")
    print_notes(trained)
    if dry_run:
        tokenizer = "no tokenizer" if vocabulary is None else f"tokenizer {vocabulary.path}"
        print(f"would write {model} to {folder} for {format}, in {dtype}, {tokenizer}:\n  {trained.config}")
        return
    if format == "huggingface":
        card = model_card(target.resolve().name, trained.config, trained.facts, trained.step)
        huggingface.save(
            folder,
            trained.params,
            trained.config,
            vocabulary,
            dtype,
            embedding_copies=embedding_copies,
            model_card=card,
        )
        if vocabulary is None:
            print("no vocabulary lies beside the model: the folder has no tokenizer; give one with vocabulary_file")
    else:
        scanned = format == "t5x_scanned"
        t5x.save(folder, trained.params, trained.config, step=trained.step, dtype=dtype, scanned=scanned)
    print(f"wrote {folder}")
