"""Finding the files of a T5X checkpoint from whatever path a user gives, local or on Google Cloud Storage."""

import os
import re
from typing import NamedTuple

from etils import epath

from endistill_jax.core.errors import UserError
from endistill_jax.storage import BUCKET, reading_failure

MSGPACK = "checkpoint"
ORBAX = "_METADATA"
_STATE = "state"
_STEP = re.compile(r"(?:checkpoint_)?(\d+)")


class Location(NamedTuple):
    """The files of a checkpoint.

    Attributes:
        step_folder: the folder of one step, such as `checkpoint_1000`.
        index: the file that names the arrays: T5X's msgpack file, or Orbax's metadata.
        config_files: gin files next to it, the closest first.
    """

    step_folder: epath.Path
    index: epath.Path
    config_files: tuple[epath.Path, ...]

    @property
    def arrays(self) -> epath.Path:
        """The folder of the arrays."""
        return self.index.parent

    @property
    def step(self) -> int:
        """The step in the folder's name; 0 if there is none."""
        named = _STEP.fullmatch(self.step_folder.name)
        return int(named.group(1)) if named else 0

    @property
    def is_orbax(self) -> bool:
        """Whether Orbax's metadata say which arrays there are."""
        return self.index.name == ORBAX


def locate(path: str) -> Location:
    """Finds a checkpoint.

    Args:
        path: a T5X model directory (its latest step is taken), the folder of a step, or the msgpack file in it.

    Raises:
        UserError: if there is none.
        StorageFailure: if it cannot be looked for now.
    """
    given = _path(path)
    try:
        found = _index(given)
    except OSError as error:
        raise reading_failure(f"{path} cannot be read", error) from error
    if found is None:
        raise UserError(
            f"{path} is no T5X checkpoint; give a model directory with checkpoint_<step>, the folder of a step, "
            f"or its file {MSGPACK}"
        )
    step_folder = found.parent.parent if found.parent.name == _STATE else found.parent
    gin_files = [step_folder / "model.gin"]
    # Files of the model directory; a step that was copied by itself has none.
    if _STEP.fullmatch(step_folder.name):
        gin_files += [step_folder.parent / name for name in ("config.gin", "model.gin")]
    return Location(step_folder, found, tuple(gin_files))


def is_checkpoint(path: str) -> bool:
    """Whether `locate` would find something. Every gs:// path counts: nothing else is read from there."""
    if path.startswith(BUCKET):
        return True
    try:
        return _index(_path(path)) is not None
    except OSError:
        return False


def key_value_store(folder: epath.Path) -> dict[str, str]:
    """TensorStore's description of a folder. What is written in a checkpoint names the place it was written to."""
    text = os.fspath(folder)
    if text.startswith(BUCKET):
        bucket, _, rest = text.removeprefix(BUCKET).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{rest}/"}
    return {"driver": "file", "path": f"{os.path.abspath(text)}/"}


def _path(path: str) -> epath.Path:
    return epath.Path(path).expanduser()


def _index(path: epath.Path) -> epath.Path | None:
    if path.is_file():
        return path if path.name in (MSGPACK, ORBAX) or _is_msgpack_map(path) else None
    if not path.is_dir():
        return None
    steps = {entry: int(match.group(1)) for entry in path.iterdir() if (match := _STEP.fullmatch(entry.name))}
    folders = [path, *sorted(steps, key=steps.__getitem__, reverse=True)]
    candidates = (folder / name for step in folders for folder in (step / _STATE, step) for name in (ORBAX, MSGPACK))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _is_msgpack_map(path: epath.Path) -> bool:
    with path.open("rb") as file:
        head = file.read(1)
    # A msgpack map of a few entries, which is what every T5X file is.
    return len(head) == 1 and 0x81 <= head[0] <= 0x8F
