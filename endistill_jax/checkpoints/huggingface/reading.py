"""Hugging Face T5 folders, local or on the hub, opened: tensors stream through NumPy one at a time, without torch."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from endistill_jax.checkpoints.huggingface.weights import Weights
from endistill_jax.checkpoints.interchange import assemble, parameters
from endistill_jax.checkpoints.tokenizer import fingerprint_of_pieces, vocabulary_of
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import Family, ModelConfig, Parameter, Params, family_named, family_names


def open_folder(folder: str | os.PathLike[str]) -> "FolderSource":
    """Opens a T5 folder: config.json with safetensors or pytorch_model.bin, each one file or several with an index.

    Names, shapes and types of all tensors are checked from the files' headers; none is read.

    Raises:
        UserError: naming file and tensor: no such folder, another architecture, a missing or damaged file, a missing,
            additional or misshapen tensor.
    """
    path = pathlib.Path(folder).expanduser()
    family, raw = read_config(path)
    config = family.huggingface.config_from_json(raw, str(path / "config.json"))
    return FolderSource(path, raw, config, Weights(path))


def load(folder: str | os.PathLike[str], dtype: Any = np.float32) -> tuple[Params, ModelConfig]:
    """The whole model of a folder as NumPy arrays, layers stacked, and its configuration.

    Raises:
        UserError: what `open_folder` and reading its tensors raise.
    """
    with open_folder(folder) as source:
        return assemble(source, dtype)[0], source.config


class FolderSource:
    """The tensors of a folder under our names; see `interchange.Source`."""

    def __init__(self, path: pathlib.Path, raw: dict[str, Any], config: ModelConfig, weights: Weights):
        self.where = str(path)
        self.config = config
        self.vocabulary = vocabulary_of(path)
        self.pieces = fingerprint_of_pieces(path) if self.vocabulary is None else None
        self.step = 0
        self.notes = (_note(path),) if self.pieces else ()
        self._weights = weights
        self._format = config.family.huggingface
        self._elsewhere = self._format.elsewhere(weights.names, raw, str(path))
        self._check_tensors()
        self._unchecked_copies = self._stored_copies()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._weights.close()

    def read(self, parameter: Parameter) -> np.ndarray:
        """One tensor in our orientation, of the type it is stored in.

        Before the first one, all that the folder holds under other names, as the embedding's, is compared with it.

        Raises:
            UserError: naming file and tensor, if it holds NaN or infinity or cannot be read, or copies differ.
        """
        while self._unchecked_copies:
            self._check_copy(self._unchecked_copies[-1])
            self._unchecked_copies.pop()
        tensor = self._format.tensor_of(parameter)
        array = self._weights.read(self._elsewhere.get(tensor.name, tensor.name))
        return array.T if tensor.transposed else array

    def _check_tensors(self) -> None:
        known = {*self._format.copies(self.config), *self._format.ignored}
        for tensor in map(self._format.tensor_of, parameters(self.config)):
            known.add(tensor.name)
            found = self._elsewhere.get(tensor.name, tensor.name)
            if found not in self._weights.names:
                raise UserError(f"{self.where} lacks the tensor {tensor.name}")
            # A head that is read from the embedding is stored as the embedding is.
            self._weights.check(found, tensor.shape)
        extra = sorted(self._weights.names - known)
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            path = self._weights.path(extra[0])
            raise UserError(f"{path} has a tensor that config.json has no place for: {extra[0]}{more}")

    def _stored_copies(self) -> list[str]:
        copies = self._format.copies(self.config)
        return [name for name in copies if name in self._weights.names and name != self._own(name)]

    def _own(self, copy: str) -> str:
        """The tensor that a copy is of, by the name it is read from."""
        original, _ = self._format.copies(self.config)[copy]
        return self._elsewhere.get(original, original)

    def _check_copy(self, name: str) -> None:
        if self._weights.equal(self._own(name), name):
            return
        advice = self._format.copies(self.config)[name][1]
        raise UserError(f"{self._weights.path(name)}: {name} differs from {self._own(name)}; {advice}")


def _note(path: pathlib.Path) -> str:
    return (
        f"{path} has tokenizer.json alone, as transformers 5 writes it, and no spiece.model: of its vocabulary the "
        "pieces and their ids are compared, how it normalizes text is not"
    )


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
