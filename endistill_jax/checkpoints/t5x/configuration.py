"""Settings of a T5X checkpoint's model that only its gin files have, not the shapes of its arrays."""

import ast
import re
from typing import Any

from endistill_jax.checkpoints.t5x.locating import Location
from endistill_jax.core.errors import UserError

_BINDING = re.compile(r"^\s*(?:[\w.]*\bT5Config\.)?(mlp_activations|logits_via_embedding|dropout_rate)\s*=\s*(.+?)\s*$")
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=\s*(.+?)\s*$")


def read_settings(location: Location, *, gated: bool, tied: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Activations and dropout from the closest gin file that sets them, and what was assumed, a sentence each.

    Raises:
        UserError: if a file says what the checkpoint cannot be.
    """
    given: dict[str, Any] = {}
    for file in location.config_files:
        if file.is_file():
            for name, value in read_gin(file.read_text()).items():
                given.setdefault(name, (value, file))
    notes = []
    if "mlp_activations" in given:
        activations, file = given["mlp_activations"]
        if not isinstance(activations, tuple | list) or len(activations) != 1 + gated:
            raise UserError(f"{file} has mlp_activations {activations}, but the checkpoint has {1 + gated} branches")
    else:
        activations = ("gelu", "linear") if gated else ("relu",)
        notes.append(f"no gin file beside it says which activations it has; taken as {' x '.join(activations)}")
    if "logits_via_embedding" in given and bool(given["logits_via_embedding"][0]) != tied:
        file = given["logits_via_embedding"][1]
        raise UserError(
            f"{file} has logits_via_embedding = {not tied}, but the checkpoint has "
            f"{'no' if tied else 'a'} decoder/logits_dense/kernel"
        )
    settings = {"mlp_activations": activations}
    if "dropout_rate" in given:
        rate, file = given["dropout_rate"]
        if not isinstance(rate, int | float):
            raise UserError(f"{file} has dropout_rate {rate!r}; a number is expected")
        settings["dropout_rate"] = float(rate)
    return settings, tuple(notes)


def read_gin(text: str) -> dict[str, Any]:
    """`mlp_activations`, `logits_via_embedding` and `dropout_rate` of a T5X model's gin file, as far as it says them.

    The file is not run: bindings of the ModelConfig are looked for, with literal values or names of macros.
    """
    lines = text.replace("\\\n", " ").splitlines()
    macros = {match.group(1): match.group(2) for line in lines if (match := _MACRO.match(line))}
    found = {}
    for line in lines:
        match = _BINDING.match(line)
        if match:
            value = match.group(2).split(" #")[0].strip()
            value = macros.get(value.removeprefix("%"), value) if value.startswith("%") else value
            try:
                found[match.group(1)] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                continue
    return found
