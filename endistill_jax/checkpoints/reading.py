"""Reading checkpoints from outside the run that writes them."""

import contextlib
import json
import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from endistill_jax.checkpoints.manifest import Manifest, upgraded
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.storage import is_remote, reading_failure, stored_path

PyTree = Any

# What a finished step cannot lack. A kill in the middle of a save or of a removal leaves folders without some of these.
_PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "facts/metadata")
_FOLDERS = ("data",)  # a bucket has no folder that is empty, as an imported model's is


def finished_steps(directory: str) -> list[int]:
    """The steps in a directory that were saved to the end, in order. Read-only; safe during a running job."""
    root = stored_path(directory)
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal() and _is_finished(p))


def restore_params(
    directory: str, step: int | None = None, *, abstract_params: PyTree | None = None
) -> tuple[PyTree, Manifest]:
    """Restores the parameters of a checkpoint only, for a teacher or an export; safe during a running job.

    Args:
        directory: what `Checkpointer` was given.
        step: which; None takes the newest.
        abstract_params: tree of `jax.ShapeDtypeStruct` with shardings to place the parameters by; None reads NumPy
            arrays. Optimizer state is not read in either case.

    Returns:
        The parameters as nested dictionaries, and the manifest.

    Raises:
        UserError: if there is no such checkpoint, or its files are damaged.
        StorageFailure: if they cannot be read now.
    """
    root = stored_path(directory)
    steps = finished_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{root} has no {wanted}; it has {steps or 'none'}")
    folder = root / str(steps[-1] if step is None else step)
    manifest = read_manifest(folder)
    try:
        # Without `ocp.Checkpointer`, which on a bucket refuses what was written locally and copied there.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            stored = reader.metadata(folder / "state").tree["params"]
        largest = _largest_gigabytes(stored)
        with contextlib.closing(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=largest)) as reader:
            if abstract_params is None:
                abstract_params = stored
                how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract_params)
            else:
                how = ocp.checkpoint_utils.construct_restore_args(abstract_params)
            wanted = ocp.args.PyTreeRestore(
                item={"params": abstract_params}, restore_args={"params": how}, partial_restore=True
            )
            return reader.restore(folder / "state", args=wanted)["params"], manifest
    except Exception as error:
        raise unreadable(folder, error) from error


def _largest_gigabytes(stored: PyTree) -> int:
    """Room for the largest array: about as much is read at a time, not a second copy of everything."""
    sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(stored)]
    return math.ceil(max(sizes) / 1e9)


def read_manifest_of_step(directory: str, step: int) -> Manifest:
    """The manifest of a complete step; reads no array.

    Raises:
        UserError: if it cannot be read.
    """
    return read_manifest(stored_path(directory) / str(step))


def read_manifest(folder: epath.Path) -> Manifest:
    """The manifest in a step's folder.

    Raises:
        UserError: if it is damaged.
        StorageFailure: if it cannot be read now.
    """
    try:
        manifest = json.loads((folder / "facts" / "metadata").read_text())
    except Exception as error:
        raise unreadable(folder, error) from error
    return upgraded(manifest)


def unreadable(folder: epath.Path, error: Exception) -> UserError | StorageFailure:
    """The exception to raise for a failure to read a step's folder."""
    return reading_failure(f"checkpoint {folder} cannot be restored", error)


def _is_finished(folder: epath.Path) -> bool:
    try:
        parts = _PARTS if is_remote(folder) else _PARTS + _FOLDERS
        if not all((folder / part).exists() for part in parts):
            return False
        return json.loads((folder / _PARTS[0]).read_text()).get("commit_timestamp_nsecs") is not None
    except (FileNotFoundError, ValueError):  # not storage failures, which would make a checkpoint look incomplete
        return False
