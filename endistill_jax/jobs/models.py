"""Finding a trained model: the bundled teacher, a Hugging Face folder, or an earlier run of this system."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from endistill_jax.checkpoints import huggingface
from endistill_jax.checkpoints.fingerprint import fingerprint_params, fingerprint_vocabulary
from endistill_jax.checkpoints.reading import finished_steps, restore_params
from endistill_jax.errors import UserError
from endistill_jax.model.config import T5Config

BUNDLED = "bundled"
BUNDLED_FOLDER = pathlib.Path(__file__).resolve().parent.parent / "assets" / "python_docs" / "teacher"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that was trained earlier.

    Attributes:
        source: where it came from, as the user named it.
        params: nested dictionary of NumPy arrays, layers stacked.
        config: its settings.
        fingerprint: of its parameters' content.
        vocabulary: fingerprint of its vocabulary, None if nothing beside it tells.
    """

    source: str
    params: Any
    config: T5Config
    fingerprint: str
    vocabulary: str | None


def load_model(source: str, dtype: str = "float32", scan_layers: bool = True) -> TrainedModel:
    """Loads a model from "bundled", a Hugging Face T5 folder, or the model directory of a run.

    Args:
        source: which.
        dtype: float32 or bfloat16: type of its parameters and of its computations.
        scan_layers: whether its layers run in a compiled loop.

    Raises:
        UserError: if there is no model, or it cannot be read.
    """
    folder = BUNDLED_FOLDER if source == BUNDLED else pathlib.Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"no model at {source}; give {BUNDLED!r}, a Hugging Face T5 folder, or the model directory of a run"
        )
    if finished_steps(str(folder / CHECKPOINTS)):
        params, facts = restore_params(str(folder / CHECKPOINTS))
        config, vocabulary = T5Config(**facts["run"]["model"]), facts["run"]["vocabulary"]
    else:
        params, config = huggingface.load(str(folder))
        vocabulary = _folder_vocabulary(folder)
    fingerprint = fingerprint_params(params)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    config = dataclasses.replace(config, dtype=dtype, scan_layers=scan_layers, dropout_rate=0.0)
    return TrainedModel(source=source, params=params, config=config, fingerprint=fingerprint, vocabulary=vocabulary)


def _folder_vocabulary(folder: pathlib.Path) -> str | None:
    from endistill_jax.data.vocabulary import load_vocabulary

    model = folder / "spiece.model"
    if not model.exists():
        return None
    tokenizer = folder / "tokenizer_config.json"
    extra_ids = json.loads(tokenizer.read_text()).get("extra_ids", 100) if tokenizer.exists() else 100
    return fingerprint_vocabulary(load_vocabulary(str(model), extra_ids=extra_ids))
