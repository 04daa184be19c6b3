"""Hugging Face T5 folders, written without torch, some rows of a tensor at a time."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from endistill_jax.checkpoints.fingerprint import row_blocks
from endistill_jax.checkpoints.folder import local_folder, replace_folder
from endistill_jax.checkpoints.huggingface.safetensors_files import Written, write_files
from endistill_jax.checkpoints.huggingface.tokenizer import check_vocabulary, write_tokenizer
from endistill_jax.checkpoints.interchange import VocabularyFile, check_finite, parameters, tensors_of
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, Parameter, Tensor

_DTYPES = ("float32", "bfloat16", "float16")


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ModelConfig,
    vocabulary: VocabularyFile | None = None,
    dtype: Any = "float32",
    *,
    model_card: str | None = None,
    embedding_copies: bool = True,
    overwrite: bool = False,
    max_file_bytes: int = 2 << 30,
) -> None:
    """Writes a folder that `transformers` loads, and with AutoTokenizer given a vocabulary.

    The write is atomic.

    Args:
        folder: where; must not exist, or be empty, unless `overwrite`.
        params: nested dictionary of NumPy or JAX arrays, layers stacked.
        config: what `params` are the parameters of.
        vocabulary: a SentencePiece model, and how many sentinels follow its own pieces.
        dtype: float32, bfloat16 or float16; what is written.
        model_card: the model card, which becomes README.md.
        embedding_copies: write the embedding under the two stacks' names too (and, tied, as the head), as older readers
            expect. Without, the file is smaller by two or three embeddings and transformers still reads it.
        overwrite: replace a folder that holds a config.json.
        max_file_bytes: beyond this the weights are split into several files with an index.

    Raises:
        UserError: if the folder is in the way, parameters do not fit the configuration, are not finite or too large for
            `dtype`, the vocabulary has more ids than the model, or writing fails.
    """
    path = local_folder(folder)
    dtype = _known_dtype(dtype)
    names = config.family.huggingface
    raw = names.config_to_json(config, dtype.name)
    fetch = tensors_of(params, config)
    if vocabulary is not None:
        check_vocabulary(vocabulary, config)
    tensors = {}
    for parameter in parameters(config):
        tensor = names.tensor_of(parameter)
        tensors[tensor.name] = _written(fetch, parameter, tensor, dtype)
    copies = names.copies(config) if embedding_copies else {}
    tensors |= {name: tensors[original] for name, (original, _) in copies.items()}
    with replace_folder(path, overwrite=overwrite) as partial:
        write_files(partial, tensors, dtype, max_file_bytes)
        if vocabulary is not None:
            write_tokenizer(partial, vocabulary, config.pad_id)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        if config.depth("decoder"):
            _write_json(partial / "generation_config.json", _generation(raw))
        _write_json(partial / "config.json", raw)


def _written(
    fetch: Callable[[Parameter], np.ndarray], parameter: Parameter, tensor: Tensor, dtype: np.dtype
) -> Written:
    def blocks() -> Iterator[np.ndarray]:
        array = fetch(parameter)
        for block in row_blocks(array.T if tensor.transposed else array):
            with np.errstate(over="ignore"):  # what does not fit becomes infinity, which is looked for
                cast = np.ascontiguousarray(block, dtype)
            check_finite(cast, f"parameter {parameter.name} in {dtype.name}")
            yield cast

    return Written(tensor.shape, blocks)


def _generation(raw: Mapping[str, Any]) -> dict[str, Any]:
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id", "use_cache")
    return {name: raw[name] for name in names}


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _known_dtype(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in _DTYPES:
        raise UserError(f"dtype is {dtype}; choose one of {', '.join(_DTYPES)}")
    return found
