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
from typing import Any

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
        """Opens the directory, creating it if needed, and sets aside incomplete steps of an interrupted run.

        Args:
            directory: where the steps' folders go; local or a bucket.
            every: save at multiples of this many steps; `force` saves at any.
            keep_last: how many of the latest checkpoints to keep.
            keep_best: name of the metric whose best checkpoint is kept too; None keeps none.
            best_mode: "min" or "max", whichever is better.
            concurrent_gigabytes: limit on what is copied and written at a time; no array may be larger.

        Raises:
            UserError: for settings that make no sense, or a path that cannot be a directory.
        """
        for name, value in (("every", every), ("keep_last", keep_last)):
            if value < 1:
                raise UserError(f"checkpoints: {name} is {value}; it must be at least 1")
        if best_mode not in ("min", "max"):
            raise UserError(f"checkpoints: best_mode is {best_mode!r}; choose min or max")
        check_writable_place(directory)
        self._directory = stored_path(directory)
        self._keep_best = keep_best
        if self._directory.exists() and not self._directory.is_dir():
            raise UserError(f"{self._directory} is a file; checkpoints need a directory")
        set_aside_incomplete(self._directory)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=_options(every, keep_last, keep_best, best_mode),
            handler_registry=_handlers(concurrent_gigabytes),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def all_steps(self) -> list[int]:
        """The kept steps in order, including one being written."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None in a directory without any."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best value of `keep_best`, or None if none has one."""
        return self._manager.best_step() if self._keep_best else None

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

        Args:
            step: number of finished optimizer steps.
            state: the train state; every leaf an array.
            data_state: positions by shard of the data stream; of all processes together, each shard once.
            manifest: plain values in nested dictionaries; see `manifest.py`.
            metrics: values of this step; one that lacks `keep_best` is an error, None leaves the step without a rank.
            force: save even when `step` is not a multiple of `every`.

        Returns:
            Whether a save was started: False if none is due at this step, or the step is already saved.

        Raises:
            UserError: if the metric named by `keep_best` is missing.
            Exception: the failure of an earlier save in the background.
        """
        if metrics is not None and self._keep_best and self._keep_best not in metrics:
            raise UserError(f"keep_best is {self._keep_best!r}, which is not among the metrics {sorted(metrics)}")
        if step in self._manager.all_steps():
            return False
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=DataStateSave(data_state),
            facts=ocp.args.JsonSave(json.loads(json.dumps(manifest))),
        )
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        return self._manager.save(step, args=items, metrics=numbers, force=force)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step; reads no array.

        Raises:
            UserError: the step does not exist or cannot be read.
        """
        self._require(step)
        return read_manifest(self._directory / str(step))

    def restore(
        self,
        step: int,
        abstract_state: PyTree,
        shards: Sequence[str] = (),
    ) -> tuple[PyTree, dict[str, bytes], Manifest]:
        """Restores a step, each array directly onto its devices.

        Args:
            step: which.
            abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, of the same structure as the saved state;
                the mesh may be another than the one that saved.
            shards: names of the data stream's shards that this process resumes with.

        Returns:
            The state, the positions of those shards, and the manifest.

        Raises:
            UserError: a step that is not there, one that does not fit `abstract_state`, or one whose files are damaged.
            StorageFailure: if its files cannot be read now.
        """
        self._require(step)
        folder = self._directory / str(step)
        manifest = read_manifest(folder)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=DataStateRestore(shards))
        try:
            restored = self._manager.restore(step, args=items)
        except UserError:
            raise
        except Exception as error:
            found = unreadable(folder, error)
            older = [other for other in self.all_steps() if other < step]
            if isinstance(found, StorageFailure) or not older:
                raise found from error
            raise UserError(f"{found}; remove that folder to resume from step {older[-1]}") from error
        return restored["state"], restored["data"], manifest

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            Exception: the failure of the save in the background.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases threads and files, even if the last save failed (and raises its exception)."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def _require(self, step: int) -> None:
        self.wait()  # the step may be the one being written
        steps = self.all_steps()
        if step not in steps:
            raise UserError(f"{self._directory} has no checkpoint of step {step}; it has {steps or 'none'}")


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
    return ocp.CheckpointManagerOptions(
        save_decision_policy=save_decision_policy.AnySavePolicy(
            [
                save_decision_policy.FixedIntervalPolicy(every),
                save_decision_policy.PreemptionCheckpointingPolicy(),
            ]
        ),
        preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
        best_fn=rank if keep_best else None,
        best_mode=best_mode,
        cleanup_tmp_directories=True,
    )


def _handlers(concurrent_gigabytes: int) -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state = ocp.StandardCheckpointHandler(save_concurrent_gb=concurrent_gigabytes)
    for item, handler, arguments in (
        ("state", state, (ocp.args.StandardSave, ocp.args.StandardRestore)),
        ("data", DataStateHandler(), (DataStateSave, DataStateRestore)),
        ("facts", ocp.JsonCheckpointHandler(), (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for argument in arguments:
            registry.add(item, argument, handler)
    return registry


class DataStateHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes this process's shards next to those of other processes, in the same commit as the arrays."""

    async def async_save(self, directory: epath.Path, args: "DataStateSave") -> list[future.Future]:
        # The folder is made in the background; this kind of future waits for it before it writes.
        return [future.CommitFutureAwaitingContractedSignals(_write_shards(directory, args.shards), name="data_state")]

    def save(self, directory: epath.Path, args: "DataStateSave") -> None:
        for name, content in args.shards.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: "DataStateRestore") -> dict[str, bytes]:
        """The requested shards, whichever process saved them.

        Raises:
            FileNotFoundError: if one is missing.
        """
        return {name: (directory / name).read_bytes() for name in args.names}


async def _write_shards(directory: epath.Path, shards: Mapping[str, bytes]) -> None:
    for name, content in shards.items():
        (directory / name).write_bytes(content)


@ocp.args.register_with_handler(DataStateHandler, for_save=True)
@dataclasses.dataclass
class DataStateSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
        shards: states by the shards' names; of all processes together, each shard once.
    """

    shards: Mapping[str, bytes]


@ocp.args.register_with_handler(DataStateHandler, for_restore=True)
@dataclasses.dataclass
class DataStateRestore(ocp.args.CheckpointArgs):
    """What to read back.

    Attributes:
        names: of the shards that this process resumes with.
    """

    names: Sequence[str]


_LOGGER = logging.getLogger(__name__)
# What Orbax writes last on a bucket, where no folder can be renamed at once.
_COMMITTED = "commit_success.txt"


def set_aside_incomplete(directory: epath.Path) -> None:
    """Sets aside step folders that a kill left incomplete: Orbax would take them for complete ones.

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
