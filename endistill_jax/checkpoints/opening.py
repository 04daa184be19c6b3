"""Detects the kind of a foreign checkpoint: a Hugging Face folder, a name on the hub, a T5X checkpoint."""

import pathlib
import re

from endistill_jax.checkpoints import huggingface, t5x
from endistill_jax.checkpoints.interchange import Source
from endistill_jax.core.errors import UserError
from endistill_jax.storage import is_remote, stored_path

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(source: str) -> Source:
    """Opens a foreign checkpoint.

    Args:
        source: a Hugging Face T5 folder; a T5X checkpoint (its model directory, the folder of a step, or the file in
            it), local or gs://; the name of a model on the Hugging Face hub, such as google/t5-v1_1-small. What exists
            locally is never looked for on the hub.

    Raises:
        UserError: if it is none of these, or cannot be read.
    """
    if is_remote(source):
        return _open_remote(source)
    path = pathlib.Path(source).expanduser()
    if (path / "config.json").is_file():
        return huggingface.open_folder(str(path))
    if t5x.is_checkpoint(source):
        return t5x.open_checkpoint(source)
    if path.is_dir():
        raise UserError(
            f"{path} is no checkpoint: it has neither config.json (Hugging Face), checkpoint_<step> (T5X), nor "
            "checkpoints/<step> (a run)"
        )
    if not path.exists() and _HUB_NAME.fullmatch(source):
        return huggingface.open_folder(huggingface.download(source))
    raise UserError(
        f"no model at {source}; give 'bundled', a Hugging Face T5 folder or hub name, a T5X checkpoint, "
        "or the model directory of a run"
    )


def _open_remote(source: str) -> Source:
    """Of foreign checkpoints, those of T5X alone are read from buckets."""
    if (stored_path(source) / "config.json").exists():
        raise UserError(
            f"{source} is a Hugging Face folder on a bucket, and these are read from local disks only: copy it with "
            "'gcloud storage cp -r', or import it and copy what that writes"
        )
    return t5x.open_checkpoint(source)
