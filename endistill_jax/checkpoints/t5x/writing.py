"""Writing T5X's own format: a msgpack file, and an array of TensorStore's for every tensor."""

import os
import pathlib
from collections.abc import Mapping
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
from endistill_jax.storage import local_folder, replace_folder

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
    """Writes `checkpoint_<step>` into a T5X model directory, for the networks of `t5x.examples`.

    It holds parameters and the step, no optimizer state, and `model.gin`, which configures T5X's network for them. The
        write is atomic; one tensor is in memory at a time.

    Args:
        folder: the model directory, local; made if need be.
        params: nested dictionary of NumPy or JAX arrays, layers stacked.
        config: what `params` are the parameters of.
        step: the number of the checkpoint.
        dtype: float32 or bfloat16; what is written.
        scanned: write for `t5x.examples.scalable_t5` with scanned layers, whose position biases repeat in every layer;
            else for `t5x.examples.t5`, or, with a bias of its own in every layer, `scalable_t5` unscanned.
        overwrite: replace a checkpoint of that step.

    Raises:
        UserError: if something is in the way, T5X's network cannot be such a model, parameters do not fit the
            configuration or are not finite, or writing fails.
    """
    model_dir = local_folder(folder)
    dtype = np.dtype(dtype)
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype}; choose float32 or bfloat16")
    if step < 0:
        raise UserError(f"step is {step}; it must be at least 0")
    names = config.family.t5x
    if names is None:
        raise UserError(f"T5X has no network for models of the family {config.family.name}")
    layout = names.choose_layout(config, scanned=scanned)
    text = gin_text(*names.network_settings(config, layout))
    fetch = tensors_of(params, config)
    was_there = model_dir.exists()
    try:
        with replace_folder(model_dir / f"checkpoint_{step}", overwrite=overwrite, marker=MSGPACK) as partial:
            writer = _Writer(partial, config, dtype, layout)
            for parameter in parameters(config):
                writer.write(parameter, fetch(parameter))
            (partial / "model.gin").write_text(text, encoding="utf-8")
            (partial / MSGPACK).write_bytes(_msgpack(writer.described, step))
    except BaseException:
        if not was_there and model_dir.is_dir() and not any(model_dir.iterdir()):
            model_dir.rmdir()
        raise


def gin_text(example: str, settings: Mapping[str, Any]) -> str:
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


class _Writer:
    """Writes tensors into their arrays, making an array with its first tensor.

    Attributes:
        described: TensorStore's description of every array, by T5X's name.
    """

    def __init__(self, folder: pathlib.Path, config: ModelConfig, dtype: np.dtype, layout: Any):
        self._folder = folder
        self._config = config
        self._names = config.family.t5x
        self._dtype = dtype
        self._layout = layout
        self._stores: dict[str, ts.TensorStore] = {}
        self.described: dict[str, dict[str, Any]] = {}

    def write(self, parameter: Parameter, tensor: np.ndarray) -> None:
        """Writes one tensor, the position bias of a stack into each of its layers.

        Raises:
            OSError: if the disk refuses it.
        """
        shape = self._names.tensor_shapes(parameter, self._config)[-1 if self._layout.split_heads else 0]
        depth = self._config.depth(parameter.path[0]) if len(parameter.path) > 2 else 1
        tensor = tensor.astype(self._dtype, copy=False).reshape(shape)
        try:
            for found in self._names.places(parameter, self._config, self._layout):
                store = self._stores.get(found.name) or self._create(found, shape, depth)
                self._stores[found.name] = store
                index = ... if found.layer is None else (*(slice(None),) * self._layout.scan_axis, found.layer)
                store[index].write(tensor).result()
        except (ValueError, RuntimeError) as error:  # what TensorStore makes of a full disk
            raise OSError(f"{parameter.name}: {str(error).split(' [')[0]}") from error

    def _create(self, found: Any, shape: tuple[int, ...], depth: int) -> ts.TensorStore:
        folder = f"target.{found.name.replace('/', '.')}"
        # A piece holds no more than one layer, so that layers are written and read by themselves.
        pieces = _pieces(shape, self._dtype.itemsize)
        if found.layer is not None:
            shape = self._names.insert_axis(shape, self._layout.scan_axis, depth)
            pieces = self._names.insert_axis(pieces, self._layout.scan_axis, 1)
        metadata = {"shape": shape, "chunks": pieces, "compressor": {"id": "gzip", "level": 1}}
        spec = {"driver": "zarr", "dtype": self._dtype.name, "metadata": metadata}
        relative = {"driver": "file", "path": folder}
        self.described[found.name] = {**spec, "kvstore": relative, "metadata": _plain(metadata)}
        store = key_value_store(epath.Path(os.fspath(self._folder / folder)))
        # Pieces of zeros are written too: one that is not there is taken for lost when it is read.
        options = {"create": True, "store_data_equal_to_fill_value": True}
        return ts.open({**spec, "kvstore": store, **options}).result()


def _pieces(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of an array's pieces: halves of the longest axis until one is small enough."""
    pieces = list(shape)
    while int(np.prod(pieces)) * itemsize > _PIECE_BYTES:
        longest = pieces.index(max(pieces))
        pieces[longest] = -(-pieces[longest] // 2)
    return tuple(pieces)


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in metadata.items()}


def _msgpack(described: Mapping[str, Any], step: int) -> bytes:
    target = traverse_util.unflatten_dict(dict(described), sep="/")
    state = {"step": np.asarray(step, np.int32)}
    return serialization.msgpack_serialize({"version": _VERSION, "optimizer": {"target": target, "state": state}})
