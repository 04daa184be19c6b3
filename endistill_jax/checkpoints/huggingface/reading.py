"""Hugging Face T5 folders, opened: tensors stream through NumPy one at a time, without torch."""

import os
import pathlib
from typing import Any, Self

import numpy as np

from endistill_jax.checkpoints.huggingface.config import config_from_json, read_config, scales_logits
from endistill_jax.checkpoints.huggingface.names import EMBEDDING, EMBEDDING_COPIES, HEAD, IGNORED, tensor_of
from endistill_jax.checkpoints.huggingface.tokenizer import fingerprint_of_pieces, vocabulary_of
from endistill_jax.checkpoints.huggingface.weights import Weights
from endistill_jax.checkpoints.interchange import Parameter, Params, assemble, parameters
from endistill_jax.core.errors import UserError
from endistill_jax.models.t5.config import T5Config


def open_folder(folder: str | os.PathLike[str]) -> "FolderSource":
    """Opens a T5 folder: config.json with safetensors or pytorch_model.bin, each one file or several with an index.

    Names, shapes and types of all tensors are checked from the files' headers; none is read.

    Raises:
        UserError: naming file and tensor: no such folder, another architecture, a missing or damaged file, a missing,
            additional or misshapen tensor.
    """
    path = pathlib.Path(folder).expanduser()
    raw = read_config(path)
    return FolderSource(path, raw, config_from_json(raw, path / "config.json"), Weights(path))


def load(folder: str | os.PathLike[str], dtype: Any = np.float32) -> tuple[Params, T5Config]:
    """The whole model of a folder as NumPy arrays, layers stacked, and its configuration.

    Raises:
        UserError: what `open_folder` and reading its tensors raise.
    """
    with open_folder(folder) as source:
        return assemble(source, dtype)[0], source.config


class FolderSource:
    """The tensors of a folder under our names; see `interchange.Source`."""

    def __init__(self, path: pathlib.Path, raw: dict[str, Any], config: T5Config, weights: Weights):
        self.where = str(path)
        self.config = config
        self.vocabulary = vocabulary_of(path)
        self.pieces = fingerprint_of_pieces(path) if self.vocabulary is None else None
        self.step = 0
        self.notes = (_note(path),) if self.pieces else ()
        self._weights = weights
        self._elsewhere = _elsewhere(weights, raw, path)
        self._check_tensors()
        self._unchecked_copies = self._embedding_copies()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._weights.close()

    def read(self, parameter: Parameter) -> np.ndarray:
        """One tensor in our orientation, of the type it is stored in.

        Before the first one, all that the folder holds under the embedding's other names is compared with it.

        Raises:
            UserError: naming file and tensor, if it holds NaN or infinity or cannot be read, or copies differ.
        """
        while self._unchecked_copies:
            self._check_copy(self._unchecked_copies[-1])
            self._unchecked_copies.pop()
        tensor = tensor_of(parameter)
        array = self._weights.read(self._elsewhere.get(tensor.name, tensor.name))
        return array.T if tensor.transposed else array

    def _check_tensors(self) -> None:
        known = {EMBEDDING, HEAD, *EMBEDDING_COPIES, *IGNORED}
        for tensor in map(tensor_of, parameters(self.config)):
            known.add(tensor.name)
            found = self._elsewhere.get(tensor.name, tensor.name)
            if found not in self._weights.names:
                raise UserError(f"{self.where} lacks the tensor {tensor.name}")
            # A head that is read from the embedding lies as the embedding does.
            self._weights.check(found, tensor.shape)
        extra = sorted(self._weights.names - known)
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            path = self._weights.path(extra[0])
            raise UserError(f"{path} has a tensor that config.json has no place for: {extra[0]}{more}")

    def _embedding_copies(self) -> list[str]:
        copies = [*EMBEDDING_COPIES, *((HEAD,) if self.config.tied_head else ())]
        found = self._elsewhere.get(EMBEDDING, EMBEDDING)
        return [name for name in copies if name in self._weights.names and name != found]

    def _check_copy(self, name: str) -> None:
        found = self._elsewhere.get(EMBEDDING, EMBEDDING)
        if self._weights.equal(found, name):
            return
        where = self._weights.path(name)
        if name == HEAD:
            raise UserError(
                f"{where}: {HEAD} differs from {found}, but config.json says that the head is tied; "
                "set tie_word_embeddings to false there if the head is the model's own"
            )
        raise UserError(f"{where}: {name} differs from {found}; a T5 has one embedding")


def _note(path: pathlib.Path) -> str:
    return (
        f"{path} has tokenizer.json alone, as transformers 5 writes it, and no spiece.model: of its vocabulary the "
        "pieces and their ids are compared, how it normalises text is not"
    )


def _elsewhere(weights: Weights, raw: dict[str, Any], path: pathlib.Path) -> dict[str, str]:
    """Embedding and head, where they lie under another name than their own."""
    embedding = next((name for name in (EMBEDDING, *EMBEDDING_COPIES) if name in weights.names), None)
    if embedding is None:
        raise UserError(f"{path} lacks the tensor {EMBEDDING}")
    if HEAD in weights.names:
        return {EMBEDDING: embedding}
    if not scales_logits(raw) and raw.get("tie_word_embeddings") is False:
        raise UserError(f"{path} lacks the tensor {HEAD}, and config.json says that the head is not tied")
    return {EMBEDDING: embedding, HEAD: embedding}
