"""Writing T5X's own format: a msgpack file, and an array of TensorStore's for every tensor."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath
from flax import serialization, traverse_util

from endistill_jax.checkpoints.interchange import parameters, tensors_of
from endistill_jax.checkpoints.t5x.files import MSGPACK, key_value_store
from endistill_jax.core.errors import UserError
from endistill_jax.models.family import ModelConfig, Parameter
from endistill_jax.storage import local_path, replace_folder

_VERSION = 3  # bfloat16 is stored as such
_PIECE_BYTES = 64 << 20
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def save(
    folder: str,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    step: int,
    dtype: Any = np.float32,
    scanned: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes `checkpoint_<step>` into a local T5X model directory, for the networks of `t5x.examples`.

    It holds parameters and the step, no optimizer state, and `model.gin`, which configures T5X's network for them. The
    write is atomic; one tensor is in memory at a time.

    Args:
        folder: the model directory; made if need be.
        params: nested dictionary of NumPy or JAX arrays, layers stacked.
        config: what `params` are the parameters of.
        step: the number of the checkpoint.
        dtype: float32 or bfloat16; what is written.
        scanned: write for `t5x.examples.scalable_t5` with scanned layers, whose position biases repeat in every layer;
            else for `t5x.examples.t5`, or, with a bias of its own in every layer, `scalable_t5` unscanned.
        overwrite: replace a checkpoint of that step.
    """
    model_dir = local_path(folder)
    dtype = np.dtype(dtype)
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype}; choose float32 or bfloat16")
    names = config.family.t5x
    if names is None:
        raise UserError(f"T5X has no network for models of the family {config.family.name}")
    layout = names.choose_layout(config, scanned=scanned)
    text = _gin_text(*names.network_settings(config, layout))
    fetch = tensors_of(params, config)
    with replace_folder(model_dir / f"checkpoint_{step}", overwrite=overwrite, marker=MSGPACK) as partial:
        described = _write_arrays(partial, fetch, config, dtype, layout)
        (partial / "model.gin").write_text(text, encoding="utf-8")
        target = traverse_util.unflatten_dict(described, sep="/")
        state = {"step": np.asarray(step, np.int32)}
        content = {"version": _VERSION, "optimizer": {"target": target, "state": state}}
        (partial / MSGPACK).write_bytes(serialization.msgpack_serialize(content))


def _gin_text(example: str, settings: Mapping[str, Any]) -> str:
    """A gin file that sets up a network of `t5x.examples` with some fields of its T5Config."""
    lines = [
        "# The model of this checkpoint, for T5X: give it after the gin file of a model of the same family, such as",
        f"# t5x/examples/{example}/t5_1_1/base.gin, whose sizes it replaces.",
        "from __gin__ import dynamic_registration",
        "",
        f"from t5x.examples.{example} import network",
        "",
        *(f"network.T5Config.{name} = {value!r}" for name, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


def _write_arrays(
    folder: pathlib.Path, fetch: Callable[[Parameter], np.ndarray], config: ModelConfig, dtype: np.dtype, layout: Any
) -> dict[str, Any]:
    """Writes all tensors, the position bias of a stack into each of its layers.

    Returns TensorStore's description of every array, by T5X's name.
    """
    names = config.family.t5x
    stores: dict[str, ts.TensorStore] = {}
    described: dict[str, Any] = {}
    for parameter in parameters(config):
        shape = names.tensor_shapes(parameter, config)[-1 if layout.split_heads else 0]
        depth = config.depth(parameter.path[0]) if len(parameter.path) > 2 else 1
        tensor = fetch(parameter).astype(dtype, copy=False).reshape(shape)
        try:
            for found in names.places(parameter, config, layout):
                stacked, index, pieces = shape, ..., _pieces(shape, dtype.itemsize)
                if found.layer is not None:
                    # A piece holds no more than one layer, so that layers are written and read by themselves.
                    stacked = names.insert_axis(shape, layout.scan_axis, depth)
                    pieces = names.insert_axis(pieces, layout.scan_axis, 1)
                    index = (*(slice(None),) * layout.scan_axis, found.layer)
                if found.name not in stores:
                    described[found.name], stores[found.name] = _create(folder, found.name, stacked, pieces, dtype)
                stores[found.name][index].write(tensor).result()
        except (ValueError, RuntimeError) as error:  # what TensorStore makes of a full disk
            raise OSError(f"{parameter.name}: {str(error).split(' [')[0]}") from error
    return described


def _create(
    folder: pathlib.Path, name: str, shape: tuple[int, ...], pieces: tuple[int, ...], dtype: np.dtype
) -> tuple[dict[str, Any], ts.TensorStore]:
    """Makes an array; returns its description and the array."""
    relative = f"target.{name.replace('/', '.')}"
    metadata = {"shape": list(shape), "chunks": list(pieces), "compressor": {"id": "gzip", "level": 1}}
    spec = {"driver": "zarr", "dtype": dtype.name, "metadata": metadata}
    # Pieces of zeros are written too: one that is not there is taken for lost when it is read.
    options = {"create": True, "store_data_equal_to_fill_value": True}
    store = ts.open({**spec, "kvstore": key_value_store(epath.Path(folder / relative)), **options}).result()
    return {**spec, "kvstore": {"driver": "file", "path": relative}}, store


def _pieces(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of an array's pieces: halves of the longest axis until one is small enough."""
    pieces = list(shape)
    while int(np.prod(pieces)) * itemsize > _PIECE_BYTES:
        longest = pieces.index(max(pieces))
        pieces[longest] = -(-pieces[longest] // 2)
    return tuple(pieces)
