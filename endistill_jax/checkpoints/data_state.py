"""Orbax handler for the data stream's state: opaque bytes, one file per shard of the stream."""

import dataclasses
from collections.abc import Mapping, Sequence

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future


class DataStateHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes this process's shards next to those of other processes, in the same commit as the arrays."""

    async def async_save(self, directory: epath.Path, args: "DataStateSave") -> list[future.Future]:
        # The folder is made in the background; this kind of future waits for it before it writes.
        return [future.CommitFutureAwaitingContractedSignals(_write(directory, args.shards), name="data_state")]

    def save(self, directory: epath.Path, args: "DataStateSave") -> None:
        for name, content in args.shards.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: "DataStateRestore") -> dict[str, bytes]:
        """The requested shards, whichever process saved them.

        Raises:
            FileNotFoundError: if one is missing.
        """
        return {name: (directory / name).read_bytes() for name in args.names}


async def _write(directory: epath.Path, shards: Mapping[str, bytes]) -> None:
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
