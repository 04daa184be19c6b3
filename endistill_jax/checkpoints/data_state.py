"""The data iterator's state as a part of a checkpoint: opaque bytes, one file per process."""

import dataclasses

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from endistill_jax.errors import UserError


def _file_name(index: int, count: int) -> str:
    return f"process_{index}_of_{count}"


class DataStateHandler(ocp.handlers.AsyncCheckpointHandler):
    """Writes this process's bytes beside the other processes', under the same commit as the arrays."""

    async def async_save(self, directory: epath.Path, args: "DataStateSave") -> list[future.Future]:
        # The folder is made in the background; this kind of future waits for it before it writes.
        return [future.CommitFutureAwaitingContractedSignals(_write(directory, args.content), name="data_state")]

    def save(self, directory: epath.Path, args: "DataStateSave") -> None:
        (directory / _file_name(jax.process_index(), jax.process_count())).write_bytes(args.content)

    def restore(self, directory: epath.Path, args: "DataStateRestore") -> bytes:
        """The bytes that this process saved.

        Raises:
            UserError: if the checkpoint was written by another number of processes: each reads its own share of the
                data, so there is no position that fits.
        """
        path = directory / _file_name(jax.process_index(), jax.process_count())
        if not path.exists():
            saved = sorted(p.name for p in directory.glob("process_*_of_*"))
            if not saved:
                raise FileNotFoundError(f"no data iterator state in {directory}")
            count = saved[0].rsplit("_", 1)[1]
            raise UserError(
                f"{directory} holds the data iterators of {count} processes and this run has {jax.process_count()}; "
                f"resume with {count} processes"
            )
        return path.read_bytes()


async def _write(directory: epath.Path, content: bytes) -> None:
    (directory / _file_name(jax.process_index(), jax.process_count())).write_bytes(content)


@ocp.args.register_with_handler(DataStateHandler, for_save=True)
@dataclasses.dataclass
class DataStateSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
        content: this process's iterator state.
    """

    content: bytes


@ocp.args.register_with_handler(DataStateHandler, for_restore=True)
@dataclasses.dataclass
class DataStateRestore(ocp.args.CheckpointArgs):
    """Asks for the bytes back; there is nothing to set."""
