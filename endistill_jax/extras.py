"""Imports of optional dependencies, with a one-line error if they are missing."""

import importlib
from types import ModuleType

from endistill_jax.core.errors import UserError

STUDIES = "studies"  # plots
METRICS = "metrics"  # ROUGE
HF = "hf"  # torch files, the Hugging Face hub
GCS = "gcs"  # checkpoints on buckets


def require(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Imports a module that may not be installed; the error begins with the purpose and names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = f"'endistill-jax[{extra}]'" if extra else "endistill-jax"
        raise UserError(f"{purpose} needs {error.name}, which is not installed: pip install {package}") from error
