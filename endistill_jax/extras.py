"""Imports of optional dependencies, with a one-line error if they are missing."""

import importlib
from types import ModuleType

from endistill_jax.core.errors import UserError

STUDIES = "studies"  # plots
METRICS = "metrics"  # ROUGE


def require(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Imports a module that may not be installed.

    Args:
        module: its full name.
        purpose: what needs it; the message starts with that.
        extra: the extra that installs it; None for what a plain install has.

    Raises:
        UserError: naming the missing package and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = f"'endistill-jax[{extra}]'" if extra else "endistill-jax"
        raise UserError(f"{purpose} needs {error.name}, which is not installed: pip install {package}") from error
