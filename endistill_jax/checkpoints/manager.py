"""Saving and resuming a run, and reading its checkpoints from outside, on Orbax: asynchronous, atomic, with a manifest.

A step's folder holds three items that are committed atomically: `state` (the train state's arrays), `data`
(the data stream's position, a file a shard) and `facts` (the manifest, as JSON). The teacher is never in it: only its
fingerprint is, in the manifest.
"""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import future
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from endistill_jax.checkpoints.manifest import Manifest, renamed_metrics, upgraded
from endistill_jax.core.errors import StorageFailure, UserError
from endistill_jax.storage import check_writable_place, is_remote, reading_failure, stored_path

PyTree = Any

_LOGGER = logging.getLogger(__name__)
# What a finished step cannot lack. A kill in the middle of a save or of a removal leaves folders without some of these.
_PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "facts/metadata")
_FOLDERS = ("data",)  # a bucket has no folder that is empty, as an imported model's is
# What Orbax writes last on a bucket, where no folder can be renamed at once.
_COMMITTED = "commit_success.txt"


class Checkpointer:
    """Keeps the checkpoints of one run in one directory. Every process makes one and calls it at the same steps.

    Usable as a context manager: leaving it waits for what is being written.
    """

    def __init__(
        self,
        directory: str,
        *,
        every: int = 1,
        keep_last: int = 3,
        keep_best: str | None = None,
        best_mode: str = "min",
        concurrent_gigabytes: int = 96,
    ):
        """Opens the directory, local or a bucket, and sets aside incomplete steps of an interrupted run.

        Args:
            directory: where the steps' folders go; made if there is none.
            every: save at multiples of this many steps; `force` saves at any.
            keep_last: how many of the latest checkpoints to keep.
            keep_best: name of the metric whose best checkpoint is kept too; None keeps none.
            concurrent_gigabytes: limit on what is copied and written at a time; no array may be larger.
        """
        check_writable_place(directory)
        self._directory = stored_path(directory)
        self._keep_best = keep_best
        _set_aside_incomplete(self._directory)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=_options(every, keep_last, keep_best, best_mode),
            handler_registry=_handlers(concurrent_gigabytes),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """The kept steps in order, including one being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None in a directory without any."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: PyTree,
        data_state: Mapping[str, bytes],
        manifest: Manifest,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts saving and returns once the arrays are copied and may be donated to the next step.

        Returns whether it started: not if none is due at this step, or the step is already saved. The failure of an
        earlier save in the background is raised here.

        Args:
            step: number of finished optimizer steps.
            state: the train state; every leaf an array.
            data_state: positions by shard of the data stream; of all processes together, each shard once.
            manifest: see `manifest.py`.
            metrics: values of this step; one that lacks `keep_best` is an error, None leaves the step without a rank.
            force: save even when `step` is not a multiple of `every`.
        """
        if metrics is not None and self._keep_best and self._keep_best not in metrics:
            raise UserError(f"keep_best is {self._keep_best!r}, which is not among the metrics {sorted(metrics)}")
        if step in self._manager.all_steps():
            return False
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=_DataSave(data_state),
            facts=ocp.args.JsonSave(json.loads(json.dumps(manifest))),
        )
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        return self._manager.save(step, args=items, metrics=numbers, force=force)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step; reads no array."""
        self.wait()  # the step may be the one being written
        steps = self.all_steps()
        if step not in steps:
            raise UserError(f"{self._directory} has no checkpoint of step {step}; it has {steps or 'none'}")
        return read_manifest(self._directory, step)

    def restore(
        self, step: int, abstract_state: PyTree, shards: Sequence[str] = ()
    ) -> tuple[PyTree, dict[str, bytes], Manifest]:
        """The state of a step, each array directly on its devices, the positions of the given shards, and the manifest.

        Args:
            step: one that is kept.
            abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, of the same structure as the saved state;
                the mesh may be another than the one that saved.
            shards: names of the data stream's shards that this process resumes with.
        """
        manifest = self.manifest(step)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=_DataRestore(shards))
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            found = _unreadable(self._directory / str(step), error)
            older = [other for other in self.all_steps() if other < step]
            if isinstance(found, StorageFailure) or not older:
                raise found from error
            raise UserError(f"{found}; remove that folder to resume from step {older[-1]}") from error
        return restored["state"], restored["data"], manifest

    def wait(self) -> None:
        """Returns when everything is on disk, or raises the failure of the save in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases threads and files, even if the last save failed (and raises its exception)."""
        try:
            self.wait()
        finally:
            self._manager.close()


# --- From outside the run that writes; safe while it runs. ---


def finished_steps(directory: str) -> list[int]:
    """The steps in a directory that were saved to the end, in order."""
    root = stored_path(directory)
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdecimal() and _is_finished(p))


def read_manifest(directory: str, step: int) -> Manifest:
    """The manifest of a complete step, in the present schema; reads no array."""
    folder = stored_path(directory) / str(step)
    try:
        manifest = json.loads((folder / "facts" / "metadata").read_text())
    except Exception as error:
        raise _unreadable(folder, error) from error
    return upgraded(manifest)


def restore_params(
    directory: str, step: int | None = None, *, abstract_params: PyTree | None = None
) -> tuple[PyTree, Manifest]:
    """The parameters of a step (None: the newest) as nested dictionaries, and its manifest.

    They are placed by the shardings of `abstract_params`, a tree of `jax.ShapeDtypeStruct`; None reads NumPy arrays.
    """
    root = stored_path(directory)
    steps = finished_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"{root} has no {wanted}; it has {steps or 'none'}")
    step = steps[-1] if step is None else step
    folder = root / str(step)
    manifest = read_manifest(directory, step)
    try:
        # Without `ocp.Checkpointer`, which on a bucket refuses what was written locally and copied there.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            stored = reader.metadata(folder / "state").tree["params"]
        # Room for the largest array: about as much is read at a time, not a second copy of everything.
        sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(stored)]
        largest = math.ceil(max(sizes) / 1e9)
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
        raise _unreadable(folder, error) from error


def _unreadable(folder: epath.Path, error: Exception) -> UserError | StorageFailure:
    return reading_failure(f"checkpoint {folder} cannot be restored", error)


def _is_finished(folder: epath.Path) -> bool:
    try:
        parts = _PARTS if is_remote(folder) else _PARTS + _FOLDERS
        if not all((folder / part).exists() for part in parts):
            return False
        return json.loads((folder / _PARTS[0]).read_text()).get("commit_timestamp_nsecs") is not None
    except (FileNotFoundError, ValueError):  # not storage failures, which would make a checkpoint look incomplete
        return False


def _set_aside_incomplete(directory: epath.Path) -> None:
    """Renames step folders that a kill left incomplete: Orbax would take them for complete ones.

    Every process must call it, before Orbax looks at the directory.
    """
    if jax.process_index() == 0 and directory.is_dir():
        finished = finished_steps(directory)
        for folder in directory.iterdir():
            if folder.name.isdecimal() and folder.is_dir() and int(folder.name) not in finished:
                aside = folder.with_name(f"{folder.name}.unfinished")
                _LOGGER.warning("%s is not a whole checkpoint; it is now %s and is not used", folder, aside)
                if aside.exists():
                    aside.rmtree()
                folder.rename(aside)
        if is_remote(directory):
            for step in finished:
                _mark_complete(directory / str(step))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("endistill_jax:set_aside_unfinished")


def _mark_complete(folder: epath.Path) -> None:
    """Marks a complete checkpoint that was copied to a bucket: Orbax would remove it as incomplete."""
    for part in (*(each for each in folder.iterdir() if each.is_dir()), folder):
        if not (part / _COMMITTED).exists():
            (part / _COMMITTED).write_text("copied")


# --- How Orbax is set up. ---


def _options(every: int, keep_last: int, keep_best: str | None, best_mode: str) -> ocp.CheckpointManagerOptions:
    worst = math.inf if best_mode == "min" else -math.inf

    def rank(metrics: Mapping[str, float]) -> float:
        value = renamed_metrics(metrics).get(keep_best, worst)
        # A comparison with NaN is always false: unguarded, a diverged step could rank anywhere.
        return worst if math.isnan(value) else value

    keep = [preservation_policy.LatestN(n=keep_last)]
    if keep_best:
        keep.append(
            preservation_policy.BestN(
                get_metric_fn=rank, reverse=best_mode == "min", n=1, keep_checkpoints_without_metrics=False
            )
        )
    when = [save_decision_policy.FixedIntervalPolicy(every), save_decision_policy.PreemptionCheckpointingPolicy()]
    return ocp.CheckpointManagerOptions(
        save_decision_policy=save_decision_policy.AnySavePolicy(when),
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        best_fn=rank if keep_best else None,
        best_mode=best_mode,
        cleanup_tmp_directories=True,
    )


def _handlers(concurrent_gigabytes: int) -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()  # knows JSON, which the manifest is
    state = ocp.StandardCheckpointHandler(save_concurrent_gb=concurrent_gigabytes)
    registry.add("state", ocp.args.StandardSave, state)
    registry.add("state", ocp.args.StandardRestore, state)
    data = _DataHandler()
    registry.add("data", _DataSave, data)
    registry.add("data", _DataRestore, data)
    return registry


class _DataHandler(ocp.handlers.AsyncCheckpointHandler):
    """The data stream's state as opaque bytes: this process's shards next to those of others, in the same commit."""

    async def async_save(self, directory: epath.Path, args: "_DataSave") -> list[future.Future]:
        # The folder is made in the background; this kind of future waits for it before it writes.
        return [future.CommitFutureAwaitingContractedSignals(_write_shards(directory, args.shards), name="data_state")]

    def save(self, directory: epath.Path, args: "_DataSave") -> None:
        raise NotImplementedError("the checkpoint manager saves asynchronously")

    def restore(self, directory: epath.Path, args: "_DataRestore") -> dict[str, bytes]:
        """The requested shards, whichever process saved them."""
        return {name: (directory / name).read_bytes() for name in args.names}


async def _write_shards(directory: epath.Path, shards: Mapping[str, bytes]) -> None:
    for name, content in shards.items():
        (directory / name).write_bytes(content)


@ocp.args.register_with_handler(_DataHandler, for_save=True)
@dataclasses.dataclass
class _DataSave(ocp.args.CheckpointArgs):
    """States by the shards' names."""

    shards: Mapping[str, bytes]


@ocp.args.register_with_handler(_DataHandler, for_restore=True)
@dataclasses.dataclass
class _DataRestore(ocp.args.CheckpointArgs):
    """Names of the shards that this process resumes with."""

    names: Sequence[str]
