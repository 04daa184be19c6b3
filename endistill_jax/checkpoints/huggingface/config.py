"""The config.json of a Hugging Face folder, and the family that reads it."""

import json
import pathlib
from typing import Any

from endistill_jax.core.errors import UserError
from endistill_jax.models.family import Family, family_named, family_names


def read_config(folder: pathlib.Path) -> tuple[Family, dict[str, Any]]:
    """The content of config.json, and the family of models that knows it.

    Raises:
        UserError: if there is no such file, it is no JSON, or no family knows its `model_type`.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a Hugging Face T5 folder (config.json, model.safetensors)")
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face T5 folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a configuration: it holds no names with values")
    kind, names = raw.get("model_type"), raw.get("architectures") or [None]
    if not isinstance(names, list):
        example = '["T5ForConditionalGeneration"]'
        raise UserError(f"{path} has architectures {json.dumps(names)}; a list such as {example} is expected")
    families = [family_named(name) for name in family_names()]
    for family in families:
        if kind in family.huggingface.model_types:
            return family, raw
    known = ", ".join(name for family in families for name in family.huggingface.model_types)
    found = names[0] or "no architecture"
    raise UserError(f"{path} describes {found} (model_type {kind}); only the model types {known} are read")
