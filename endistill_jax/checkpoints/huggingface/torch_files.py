"""Tensors of a torch file, read without executing arbitrary pickles."""

import functools
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from endistill_jax.checkpoints.huggingface.stored_tensor import StoredTensor
from endistill_jax.core.errors import UserError

_DTYPES = {
    "torch.float64": np.dtype(np.float64),
    "torch.float32": np.dtype(np.float32),
    "torch.float16": np.dtype(np.float16),
    "torch.bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def open_file(path: pathlib.Path) -> list[StoredTensor]:
    """The tensors of one `pytorch_model.bin`.

    The file is mapped into memory and read where a tensor is asked for. Files from before torch 1.6 cannot be mapped:
    those are held in memory whole while they are open.

    Raises:
        UserError: if torch is not installed, the file is damaged, or it holds something else than tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs torch; pip install 'endistill-jax[hf]', or save the model as safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch raises whatever its many parts raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged or cut short ({type(error).__name__}: {reason}); copy it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors, as pytorch_model.bin does")
    return [_stored(path, name, tensor.detach()) for name, tensor in state.items()]


def _stored(path: pathlib.Path, name: str, tensor: Any) -> StoredTensor:
    return StoredTensor(
        path=path,
        name=name,
        shape=tuple(tensor.shape),
        stored_as=str(tensor.dtype),
        dtype=_DTYPES.get(str(tensor.dtype)),
        rows=functools.partial(_rows, tensor),
    )


def _rows(tensor: Any, start: int, stop: int) -> np.ndarray:
    import torch

    # A copy: on CPU, JAX may alias the array, and the model would change, or crash, with the mapped file.
    part = tensor[start:stop].clone()
    if part.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return part.numpy()
