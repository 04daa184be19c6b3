"""Import and export of Hugging Face and T5X checkpoints."""

import dataclasses
import math
import pathlib
import shutil

import jax

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.fingerprint import fingerprint_params
from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.manifest import SCHEMA
from endistill_jax.checkpoints.model_card import model_card
from endistill_jax.checkpoints.models import (
    CHECKPOINTS,
    choose_vocabulary,
    fingerprint_of,
    keep_tokenizer,
    open_model,
    print_notes,
)
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import abstract_params, count_params
from endistill_jax.multihost import require_one_process
from endistill_jax.reports.files import json_text
from endistill_jax.reports.table import format_count
from endistill_jax.sharding import make_mesh, param_shardings
from endistill_jax.storage import check_free, local_path, replace_folder

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
    """Exports a trained model, atomically.

    Args:
        model: the model directory of a run or of an import (its last checkpoint) or `checkpoints/<step>` in it,
            "bundled", a Hugging Face folder or a T5X checkpoint.
        folder: where. A Hugging Face folder must not exist, or be empty; a T5X folder receives `checkpoint_<step>`.
        format: "huggingface" (weights, tokenizer, model card), "t5x", or "t5x_scanned" (the layers of a stack in one
            array, as `scalable_t5` has them).
        vocabulary_file: SentencePiece model that becomes the tokenizer; None uses the one stored with the model.
        extra_ids: sentinels above the pieces of `vocabulary_file`.
        dtype: of the written tensors, float32 or bfloat16.
        dropout_rate: written to the configuration for further training; None keeps that of the training.
        embedding_copies: write the embedding under all names that loaders expect, not only as `shared.weight`.
        dry_run: print what would be done, and do nothing.
    """
    require_one_process("export")
    if format not in FORMATS:
        raise UserError(f"export.format is {format!r}; choose one of {', '.join(FORMATS)}")
    trained = open_model(model, dtype)  # a model that is written narrow is not held wide
    if dropout_rate is not None:
        trained.config = dataclasses.replace(trained.config, dropout_rate=dropout_rate)
    vocabulary = choose_vocabulary(trained, vocabulary_file, extra_ids)
    target = local_path(folder)
    check_free(target if format == "huggingface" else target / f"checkpoint_{trained.step}")
    print_notes(trained)
    if dry_run:
        tokenizer = "no tokenizer" if vocabulary is None else f"tokenizer {vocabulary.path}"
        print(f"would write {model} to {folder} for {format}, in {dtype}, {tokenizer}:\n  {trained.config}")
        return
    if format == "huggingface":
        card = model_card(target.resolve().name, trained.config, trained.manifest, trained.step)
        options = {"embedding_copies": embedding_copies, "model_card": card}
        huggingface.save(folder, trained.params, trained.config, vocabulary, dtype, **options)
        if vocabulary is None:
            print("no vocabulary is stored with the model: the folder has no tokenizer; give one with vocabulary_file")
    else:
        scanned = format == "t5x_scanned"
        t5x.save(folder, trained.params, trained.config, step=trained.step, dtype=dtype, scanned=scanned)
    print(f"wrote {folder}")


def import_checkpoint(
    *,
    source: str,
    model_dir: str,
    vocabulary_file: str | None = None,
    extra_ids: int = 100,
    dtype: str = "float32",
    mesh: tuple[int, int, int] = (-1, 1, 1),
    dry_run: bool = False,
) -> None:
    """Turns a foreign checkpoint into an Orbax checkpoint with its configuration and tokenizer.

    Everything about the model is read from the checkpoint's files. Jobs accept foreign checkpoints directly too; an
    import pays off if a model is loaded often, or from several hosts.

    Args:
        source: a Hugging Face T5 folder, the name of one on the hub, or a T5X checkpoint.
        model_dir: receives `checkpoints/<step>`, `model.json` and `tokenizer/`; must not exist, or be empty. It appears
            atomically.
        vocabulary_file: SentencePiece model; None uses the one stored with the checkpoint, if any.
        extra_ids: sentinels above the pieces of `vocabulary_file`.
        dtype: float32 or bfloat16, of the written parameters.
        mesh: sizes of the axes data, fsdp and tensor to shard the parameters over during import, on this host.
        dry_run: print what would be done, and do nothing.
    """
    require_one_process("import_checkpoint")
    target = local_path(model_dir)
    check_free(target)
    opened = open_model(source, dtype)
    if opened.manifest:
        raise UserError(f"{source} is a model directory of this system; use it as it is")
    vocabulary = choose_vocabulary(opened, vocabulary_file, extra_ids)
    on = make_mesh(*mesh)
    param_shardings(opened.config, on)
    numbers = count_params(abstract_params(opened.config))
    _check_room(target, numbers * jax.numpy.dtype(dtype).itemsize)
    print(f"{source}: {format_count(numbers)} parameters\n  {opened.config}")
    print_notes(opened)
    if vocabulary is None:
        print("no vocabulary is stored with it: exports will have no tokenizer; give one with vocabulary_file")
    if dry_run:
        print(f"would write {model_dir} in {dtype}")
        return
    params = opened.load_on(on)
    with replace_folder(target) as partial:
        model = opened.config.architecture() | {"dtype": dtype, "dropout_rate": opened.config.dropout_rate}
        (partial / "model.json").write_text(json_text(model, indent=2) + "\n", encoding="utf-8")
        if vocabulary is not None:
            keep_tokenizer(str(partial), vocabulary)
        manifest = {
            "schema": SCHEMA,
            "run": {"model": model, "vocabulary": fingerprint_of(vocabulary)},
            # What was read and what is written differ if the type became narrower.
            "import": {
                "source": source,
                "pieces": opened.pieces,
                "fingerprint": opened.fingerprint if dtype == "float32" else fingerprint_params(params),
            },
        }
        # About one array after the other: a large model is not copied as a whole on its way to the disk.
        largest = math.ceil(max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9)
        with Checkpointer(str(partial / CHECKPOINTS), keep_last=1, concurrent_gigabytes=largest) as checkpointer:
            checkpointer.save(opened.step, {"params": params}, {}, manifest, force=True)
    print(f"wrote {model_dir}")


def _check_room(target: pathlib.Path, needed: int) -> None:
    place = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place} has {free / 1e9:.3g} GB free, and the parameters take up to {needed / 1e9:.3g} GB; "
            "make room, or give another model_dir"
        )
