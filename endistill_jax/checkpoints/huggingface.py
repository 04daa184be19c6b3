"""Hugging Face T5 folders, read and written without torch: tensors stream through NumPy one at a time."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from endistill_jax.checkpoints.folder import replace_folder
from endistill_jax.checkpoints.huggingface_config import config_from_json, config_to_json, read_config, scales_logits
from endistill_jax.checkpoints.huggingface_names import EMBEDDING, EMBEDDING_COPIES, HEAD, IGNORED, Entry, entries
from endistill_jax.checkpoints.huggingface_tokenizer import check_vocabulary, write_tokenizer
from endistill_jax.checkpoints.safetensors_folder import TensorReader, write_tensors
from endistill_jax.errors import UserError
from endistill_jax.model.config import T5Config

Params = dict[str, Any]

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def load(folder: str, dtype: Any = np.float32) -> tuple[Params, T5Config]:
    """Reads a T5 v1.0 or v1.1 folder: config.json with model.safetensors, or with several files and their index.

    Names, shapes and types of all tensors are checked from the files' headers before the first is read.

    Args:
        folder: a local folder.
        dtype: float32 or bfloat16; what the parameters become.

    Returns:
        Parameters as nested dictionaries of NumPy arrays, layers stacked, and the configuration.

    Raises:
        UserError: naming file and tensor: no such folder, another architecture, a missing or damaged file, a missing,
            additional or misshapen tensor, NaN or infinity.
    """
    path = pathlib.Path(folder).expanduser()
    raw = read_config(path)
    dtype = _known_dtype(dtype)
    with TensorReader(path) as tensors:
        sources, own_head = _sources(tensors, raw, path)
        config = config_from_json(raw, path / "config.json", own_head=own_head)
        wanted = list(entries(config))
        _check_tensors(tensors, wanted, sources, path)
        params: Params = {}
        for entry in wanted:
            *parents, leaf = entry.path
            branch = params
            for name in parents:
                branch = branch.setdefault(name, {})
            branch[leaf] = _read_entry(tensors, entry, sources, dtype)
    return params, config


def save(
    folder: str,
    params: Mapping[str, Any],
    config: T5Config,
    vocabulary_file: str | None = None,
    dtype: Any = np.float32,
    *,
    extra_ids: int = 100,
    embedding_copies: bool = True,
    overwrite: bool = False,
    max_file_bytes: int = 2 << 30,
) -> None:
    """Writes a folder that `transformers` loads as T5ForConditionalGeneration, and as AutoTokenizer given a vocabulary.

    The folder appears under its name when it is whole, or not at all.

    Args:
        folder: where; must not exist, or be empty, unless `overwrite`.
        params: nested dictionary of NumPy or JAX arrays, layers stacked.
        config: what `params` are the parameters of.
        vocabulary_file: a SentencePiece model, without the extra ids.
        dtype: float32 or bfloat16; what is written.
        extra_ids: sentinels that follow the vocabulary's own pieces.
        embedding_copies: write the embedding under the two stacks' names too (and, tied, as the head), as older readers
            expect. Without, the file is smaller by two or three embeddings and transformers still reads it.
        overwrite: replace a folder that holds a config.json.
        max_file_bytes: beyond this the weights are split into several files with an index. It also bounds the memory
            for tensors that are held at a time.

    Raises:
        UserError: if the folder is in the way, parameters do not fit the configuration or are not finite, the
            vocabulary has more ids than the model, or writing fails.
    """
    path = pathlib.Path(folder).expanduser()
    dtype = _known_dtype(dtype)
    raw = config_to_json(config, dtype.name)
    wanted = list(entries(config))
    _check_params(params, wanted)
    if vocabulary_file is not None:
        check_vocabulary(vocabulary_file, extra_ids, config.vocab_size)
    makers = {name: (entry, index) for entry in wanted for index, name in enumerate(entry.tensors)}
    copied = (*EMBEDDING_COPIES, *((HEAD,) if config.tied_head else ())) if embedding_copies else ()
    makers.update(dict.fromkeys(copied, makers[EMBEDDING]))
    sizes = {name: int(np.prod(entry.shape)) * dtype.itemsize for name, (entry, _) in makers.items()}

    def make(name: str) -> np.ndarray:
        return _write_entry(params, *makers[name], dtype)

    with replace_folder(path, overwrite=overwrite) as partial:
        write_tensors(partial, sizes, make, max_file_bytes)
        if vocabulary_file is not None:
            write_tokenizer(partial, vocabulary_file, extra_ids)
        generation = {name: raw[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")}
        _write_json(partial / "generation_config.json", generation)
        _write_json(partial / "config.json", raw)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _known_dtype(dtype: Any) -> np.dtype:
    found = np.dtype(dtype)
    if found not in _DTYPES.values():
        raise UserError(f"dtype is {found}; choose one of {', '.join(_DTYPES)}")
    return found


def _sources(tensors: TensorReader, raw: Mapping[str, Any], path: pathlib.Path) -> tuple[dict[str, str], bool]:
    """Where embedding and head are read from, and whether the head differs from the embedding."""
    present = [name for name in (EMBEDDING, *EMBEDDING_COPIES) if name in tensors.names]
    if not present:
        raise UserError(f"{path} lacks the tensor {EMBEDDING}")
    embedding = tensors.read(present[0])
    for name in present[1:]:
        if not np.array_equal(tensors.read(name), embedding):
            raise UserError(f"{tensors.path(name)}: {name} differs from {present[0]}; a T5 has one embedding")
    if HEAD in tensors.names:
        own_head = not np.array_equal(tensors.read(HEAD), embedding)
        return {EMBEDDING: present[0]}, own_head
    if not scales_logits(raw) and raw.get("tie_word_embeddings") is False:
        raise UserError(f"{path} lacks the tensor {HEAD}, and config.json says that the head is not tied")
    return {EMBEDDING: present[0], HEAD: present[0]}, False


def _check_tensors(tensors: TensorReader, wanted: list[Entry], sources: Mapping[str, str], path: pathlib.Path) -> None:
    known = {EMBEDDING, HEAD, *EMBEDDING_COPIES, *IGNORED}
    for entry in wanted:
        for name in entry.tensors:
            known.add(name)
            source = sources.get(name, name)
            if source not in tensors.names:
                raise UserError(f"{path} lacks the tensor {name}")
            if tensors.shape(source) != entry.tensor_shape:
                raise UserError(
                    f"{tensors.path(source)}: {source} has shape {tensors.shape(source)}; "
                    f"config.json makes it {entry.tensor_shape}"
                )
    extra = sorted(tensors.names - known)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{tensors.path(extra[0])} has a tensor that config.json has no place for: {extra[0]}{more}")


def _read_entry(tensors: TensorReader, entry: Entry, sources: Mapping[str, str], dtype: np.dtype) -> np.ndarray:
    out = np.empty((len(entry.tensors), *entry.shape), dtype)
    for slot, name in zip(out, entry.tensors, strict=True):
        tensor = tensors.read(sources.get(name, name))
        slot[...] = tensor.T if entry.transposed else tensor
    return out if entry.stacked else out[0]


def _leaf(params: Mapping[str, Any], entry: Entry) -> Any:
    leaf: Any = params
    for name in entry.path:
        if not isinstance(leaf, Mapping) or name not in leaf:
            raise UserError(f"the parameters lack {'/'.join(entry.path)}, which the configuration asks for")
        leaf = leaf[name]
    return leaf


def _check_params(params: Mapping[str, Any], wanted: list[Entry]) -> None:
    for entry in wanted:
        shape = (len(entry.tensors), *entry.shape) if entry.stacked else entry.shape
        leaf = _leaf(params, entry)
        if tuple(leaf.shape) != shape:
            raise UserError(f"{'/'.join(entry.path)} has shape {tuple(leaf.shape)}; the configuration makes it {shape}")
    extra = sorted(set(_paths(params)) - {"/".join(entry.path) for entry in wanted})
    if extra:
        raise UserError(f"the configuration has no place for the parameter {extra[0]}")


def _paths(params: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in params.items():
        paths += _paths(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return paths


def _write_entry(params: Mapping[str, Any], entry: Entry, index: int, dtype: np.dtype) -> np.ndarray:
    leaf = _leaf(params, entry)
    array = np.asarray(leaf[index] if entry.stacked else leaf)
    if not np.isfinite(array).all():
        raise UserError(f"parameter {'/'.join(entry.path)} holds NaN or infinity; nothing was written")
    return np.ascontiguousarray(array.T if entry.transposed else array, dtype=dtype)
