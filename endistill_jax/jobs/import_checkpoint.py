"""From a Hugging Face or T5X checkpoint to a model directory of our own."""

import math

import jax

from endistill_jax.checkpoints.fingerprint import fingerprint_params
from endistill_jax.checkpoints.manager import Checkpointer
from endistill_jax.checkpoints.reading import finished_steps
from endistill_jax.errors import UserError
from endistill_jax.jobs.models import CHECKPOINTS, TrainedModel, keep_tokenizer, open_model
from endistill_jax.model.t5 import count_params
from endistill_jax.reports.files import json_text, write_atomically
from endistill_jax.reports.table import format_count
from endistill_jax.sharding import abstract_params, make_mesh, param_shardings


def import_checkpoint(
    *,
    source: str,
    model_dir: str,
    dtype: str = "float32",
    mesh: tuple[int, int, int] = (-1, 1, 1),
    dry_run: bool = False,
) -> None:
    """Turns a foreign checkpoint into an Orbax checkpoint with its configuration and tokenizer beside it.

    The model is read from the checkpoint's files alone: nothing about it need be given. Jobs take foreign checkpoints
    directly as well; an import pays where a model is loaded often, or from several hosts.

    Args:
        source: a Hugging Face T5 folder, the name of one on the hub, or a T5X checkpoint.
        model_dir: receives `checkpoints/<step>`, `model.json` and `tokenizer/`.
        dtype: float32 or bfloat16: type of the written parameters.
        mesh: sizes of the axes data, fsdp and tensor on which the parameters lie meanwhile.
        dry_run: print what would be done, and do nothing.

    Raises:
        UserError: for a source that cannot be read, or a model directory that is in use or cannot be written.
    """
    directory = f"{model_dir}/{CHECKPOINTS}"
    if finished_steps(directory):
        raise UserError(f"{model_dir} holds checkpoints already; give another model_dir")
    opened = open_model(source, dtype)
    if opened.facts:
        raise UserError(f"{source} is a model directory of this system; use it as it is")
    on = make_mesh(*mesh)
    param_shardings(opened.config, on)
    size = format_count(count_params(abstract_params(opened.config)))
    print(f"{source}: {size} parameters\n  {opened.config}", *opened.notes, sep="\n  ")
    if dry_run:
        print(f"would write {model_dir} in {dtype}")
        return
    params = opened.load(on)
    try:
        write_atomically(f"{model_dir}/model.json", json_text(opened.config.architecture(), indent=2) + "\n")
        if opened.vocabulary_file is not None:
            keep_tokenizer(model_dir, opened.vocabulary_file)
        # About one array after the other: a large model is not copied as a whole on its way to the disk.
        largest = math.ceil(max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9)
        with Checkpointer(directory, keep_last=1, concurrent_gigabytes=largest) as checkpointer:
            checkpointer.save(opened.step, {"params": params}, b"", _facts(opened, params, dtype), force=True)
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore report a full disk in several types
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"could not write {model_dir}: {reason}; there is no checkpoint in it") from error
    print(f"wrote {model_dir}")


def _facts(opened: TrainedModel, params: dict, dtype: str) -> dict:
    # What was read and what is written differ if the type became narrower.
    fingerprint = opened.fingerprint if dtype == "float32" else fingerprint_params(params)
    return {
        "run": {"model": opened.config.architecture() | {"dtype": dtype}, "vocabulary": opened.vocabulary},
        "import": {"source": opened.source, "fingerprint": fingerprint},
    }
