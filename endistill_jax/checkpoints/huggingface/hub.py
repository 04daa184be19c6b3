"""Downloads models from the Hugging Face hub."""

import pathlib
from collections.abc import Sequence

from endistill_jax.checkpoints.huggingface.config import read_config
from endistill_jax.core.errors import UserError

_SMALL = ("config.json", "generation_config.json", "spiece.model", "*token*.json")
# The first that the model has is taken; files for other frameworks stay where they are.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def download(name: str) -> str:
    """Fetches what is needed of a model, unless it is in the hub's cache already.

    The configuration comes first, so that no weights are fetched of a model that cannot be read.

    Args:
        name: such as `google/t5-v1_1-small`.

    Returns:
        The folder, within the hub's cache.

    Raises:
        UserError: if `huggingface_hub` is not installed, there is no such model or no access to it or to the network,
            or it is no T5.
    """
    folder = _fetch(name, _SMALL)
    read_config(folder)
    for patterns in _WEIGHTS:
        folder = _fetch(name, patterns)
        if any((folder / file).exists() for file in patterns[:2]):
            break
    return str(folder)


def _fetch(name: str, patterns: Sequence[str]) -> pathlib.Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"{name} is not a folder here, and looking for it on the Hugging Face hub needs huggingface_hub; "
            "pip install 'endistill-jax[hf]', or give a folder"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} asks for consent: agree to its terms on huggingface.co, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the Hugging Face hub has no model {name}, or it is private (then log in with `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is neither a folder here nor in the hub's cache, and the Hugging Face hub cannot be reached"
        ) from error
    except Exception as error:  # of the network library beneath, which is not always the same one
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"could not download {name} ({type(error).__name__}: {reason})") from error
