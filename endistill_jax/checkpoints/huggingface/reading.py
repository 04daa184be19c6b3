"""Hugging Face T5 folders, local or on the hub, opened: tensors stream through NumPy one at a time, without torch."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from endistill_jax.checkpoints.huggingface.weights import StoredTensor, open_weights
from endistill_jax.checkpoints.interchange import Source, assemble, check_finite, parameters
from endistill_jax.checkpoints.tokenizer import fingerprint_of_pieces, vocabulary_of
from endistill_jax.core.errors import UserError
from endistill_jax.extras import HF, require
from endistill_jax.models.family import Family, ModelConfig, Parameter, Params, family_named, family_names

_SMALL = ("config.json", "generation_config.json", "spiece.model", "*token*.json")
# The first that the model has is taken; files for other frameworks stay where they are.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def load(folder: str | os.PathLike[str], dtype: Any = np.float32) -> tuple[Params, ModelConfig]:
    """The whole model of a folder as NumPy arrays, layers stacked, and its configuration."""
    with open_folder(folder) as source:
        return assemble(source, dtype)[0], source.config


def open_folder(folder: str | os.PathLike[str]) -> "FolderSource":
    """Opens a T5 folder: config.json with safetensors or pytorch_model.bin, each one file or several with an index.

    Names, shapes and types of all tensors are checked from the files' headers; none is read.
    """
    path = pathlib.Path(folder).expanduser()
    return FolderSource(path, *_read_config(path))


class FolderSource(Source):
    """The tensors of a folder under our names; see `interchange.Source`."""

    def __init__(self, path: pathlib.Path, family: Family, raw: dict[str, Any]):
        self._format = family.huggingface
        self.where = str(path)
        self.config = self._format.config_from_json(raw, str(path / "config.json"))
        self._tensors = open_weights(path)
        self.vocabulary = vocabulary_of(path)
        self.pieces = fingerprint_of_pieces(path) if self.vocabulary is None else None
        if self.pieces:
            self.notes = (
                f"{path} has tokenizer.json alone, as transformers 5 writes it, and no spiece.model: of its vocabulary "
                "the pieces and their ids are compared, how it normalizes text is not",
            )
        self._elsewhere = self._format.elsewhere(frozenset(self._tensors), raw, str(path))
        self._check_tensors()
        # (a tensor under another name, the one under its own, what to do if they differ), not compared yet.
        self._copies: list[tuple[StoredTensor, StoredTensor, str]] = []
        for name, (original, advice) in self._format.copies(self.config).items():
            found = self._elsewhere.get(original, original)
            if name in self._tensors and name != found:
                self._copies.append((self._tensors[name], self._tensors[found], advice))

    def close(self) -> None:
        self._tensors = {}  # files of torch are closed with their last tensor

    def read(self, parameter: Parameter) -> np.ndarray:
        """One tensor in our orientation, of the type it is stored in.

        Before the first one, all that the folder holds under other names, as the embedding's, is compared with it.
        """
        while self._copies:
            copy, original, advice = self._copies[-1]
            if not copy.equals(original):
                raise UserError(f"{copy.path}: {copy.name} differs from {original.name}; {advice}")
            self._copies.pop()
        tensor = self._format.tensor_of(parameter)
        stored = self._tensors[self._elsewhere.get(tensor.name, tensor.name)]
        array = stored.rows(0, stored.shape[0])
        check_finite(array, f"{stored.path}: {stored.name}")
        return array.T if tensor.transposed else array

    def _check_tensors(self) -> None:
        known = {*self._format.copies(self.config), *self._format.ignored}
        for tensor in map(self._format.tensor_of, parameters(self.config)):
            known.add(tensor.name)
            found = self._elsewhere.get(tensor.name, tensor.name)
            if found not in self._tensors:
                raise UserError(f"{self.where} lacks the tensor {tensor.name}")
            # A head that is read from the embedding is stored as the embedding is.
            self._tensors[found].check(tensor.shape)
        extra = sorted(self._tensors.keys() - known)
        if extra:
            path = self._tensors[extra[0]].path
            raise UserError(f"{path} has a tensor that config.json has no place for: {extra[0]}")


def download(name: str) -> str:
    """Fetches what is needed of a model such as `google/t5-v1_1-small`, unless it is in the hub's cache already.

    Returns the folder, within the hub's cache. The configuration comes first, so that no weights are fetched of a model
    that cannot be read.
    """
    folder = _fetch(name, _SMALL)
    _read_config(folder)
    for patterns in _WEIGHTS:
        folder = _fetch(name, patterns)
        if any((folder / file).exists() for file in patterns[:2]):
            break
    return str(folder)


def _read_config(folder: pathlib.Path) -> tuple[Family, dict[str, Any]]:
    """The family of models that knows a config.json, and the file's content."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face T5 folder (config.json, model.safetensors)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    families = [family_named(name) for name in family_names()]
    for family in families:
        if raw.get("model_type") in family.huggingface.model_types:
            return family, raw
    known = ", ".join(name for family in families for name in family.huggingface.model_types)
    name, kind = (raw.get("architectures") or ["no architecture"])[0], raw.get("model_type")
    raise UserError(f"{path} describes {name} (model_type {kind}); only the model types {known} are read")


def _fetch(name: str, patterns: Sequence[str]) -> pathlib.Path:
    hub = require("huggingface_hub", f"{name} is not a folder here, and fetching it from the Hugging Face hub", HF)
    try:
        return pathlib.Path(hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's own, or of the network library beneath, which is not always the same one
        reason = " ".join(str(error).split())[:400]
        raise UserError(
            f"{name} is not a folder here, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error
