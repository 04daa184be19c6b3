"""Hugging Face T5 folders, written without torch, some rows of a tensor at a time.

The library that defines safetensors writes what is in memory as a whole; here the numbers go through ordinary writes.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from endistill_jax.checkpoints.fingerprint import row_blocks
from endistill_jax.checkpoints.huggingface.weights import LENGTH_BYTES, SAFETENSORS_DTYPES
from endistill_jax.checkpoints.interchange import check_finite, parameters, tensors_of
from endistill_jax.checkpoints.tokenizer import VocabularyFile, check_vocabulary, write_tokenizer
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, Parameter, Tensor
from endistill_jax.storage import local_path, replace_folder

_DTYPES = ("float32", "bfloat16", "float16")
_ALIGNMENT = 8  # of a safetensors header


class Written(NamedTuple):
    """A tensor to be written; `blocks` returns its rows in order, in blocks, when it is written."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]


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
    """Writes a folder that `transformers` loads, and with AutoTokenizer given a vocabulary. It appears atomically.

    Args:
        folder: must not exist, or be empty, unless `overwrite`.
        params: nested dictionary of NumPy or JAX arrays, layers stacked.
        config: what `params` are the parameters of.
        vocabulary: becomes the tokenizer.
        dtype: float32, bfloat16 or float16; what is written.
        model_card: becomes README.md.
        embedding_copies: write the embedding under the two stacks' names too (and, tied, as the head), as older readers
            expect. Without, the file is smaller by two or three embeddings and transformers still reads it.
        overwrite: replace a folder that holds a config.json.
        max_file_bytes: beyond this the weights are split into several files with an index.
    """
    path = local_path(folder)
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise UserError(f"dtype is {dtype}; choose one of {', '.join(_DTYPES)}")
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
            generation = ("decoder_start_token_id", "eos_token_id", "pad_token_id", "use_cache")
            _write_json(partial / "generation_config.json", {name: raw[name] for name in generation})
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


def write_files(folder: pathlib.Path, tensors: Mapping[str, Written], dtype: np.dtype, max_file_bytes: int) -> None:
    """Writes tensors in the given order as safetensors, a block at a time.

    A new file is begun beyond `max_file_bytes`; one file gets the plain name, several an index.
    """
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in tensors.items()}
    groups: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        _write_file(folder / "model.safetensors", tensors, dtype)
        return
    where = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, dtype)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_file(path: pathlib.Path, tensors: Mapping[str, Written], dtype: np.dtype) -> None:
    names = {known: name for name, known in SAFETENSORS_DTYPES.items()}
    # transformers refuses files that do not say which framework wrote them.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block, dtype).view(np.uint8).data)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
