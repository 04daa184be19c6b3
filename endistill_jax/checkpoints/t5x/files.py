"""The files of a T5X checkpoint: found from whatever path a user gives, and the msgpack file read lazily."""

import os
import re
from typing import Any, NamedTuple

import msgpack
from etils import epath
from flax import serialization

from endistill_jax.core.errors import UserError
from endistill_jax.storage import BUCKET

MSGPACK = "checkpoint"
ORBAX = "_METADATA"
_STATE = "state"
_STEP = re.compile(r"(?:checkpoint_)?(\d+)")

_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY = 1  # Flax's extension type
_HEADER = 256  # bytes that surely hold the shape and type of an array


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


def locate(path: str) -> Location:
    """Finds a checkpoint: a T5X model directory (its latest step is taken), the folder of a step, or the file in it."""
    found = _index(epath.Path(path).expanduser())
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
        return _index(epath.Path(path).expanduser()) is not None
    except OSError:
        return False


def key_value_store(folder: epath.Path) -> dict[str, str]:
    """TensorStore's description of a folder. What is written in a checkpoint names the place it was written to."""
    text = os.fspath(folder)
    if text.startswith(BUCKET):
        bucket, _, rest = text.removeprefix(BUCKET).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{rest}/"}
    return {"driver": "file", "path": f"{os.path.abspath(text)}/"}


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


class Node(NamedTuple):
    """A value in a msgpack file: its bytes [start, end), and of a map that was looked into its values by key."""

    start: int
    end: int
    children: dict[str, "Node"] | None

    def at(self, *keys: str) -> "Node | None":
        """The value under some keys, None if there is none."""
        node: Node | None = self
        for key in keys:
            node = node.children.get(key) if node is not None and node.children else None
        return node

    @property
    def is_chunked_array(self) -> bool:
        """Whether this map is an array that Flax cut into pieces."""
        return bool(self.children) and _CHUNKED in self.children


class MsgpackFile:
    """A Flax msgpack file, indexed by place without loading arrays; under the keys `skipped` nothing is looked at."""

    def __init__(self, path: epath.Path, skipped: tuple[tuple[str, ...], ...] = ()):
        self.path = path
        self._skipped = skipped
        try:
            with path.open("rb") as file:
                unpacker = msgpack.Unpacker(file, max_buffer_size=2**31 - 1, read_size=1 << 20)
                self.root = self._node(unpacker, ())
        except (msgpack.exceptions.UnpackException, UnicodeDecodeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise UserError(f"{path} is damaged, cut short or no msgpack file ({reason}); copy it again") from error
        if self.root.children is None:
            raise UserError(f"{path} is damaged or no checkpoint: it holds no msgpack map; copy it again")

    def load(self, node: Node) -> Any:
        """A value, arrays as NumPy arrays."""
        return serialization.msgpack_restore(self._bytes(node.start, node.end))

    def array_type(self, node: Node) -> tuple[tuple[int, ...], str] | None:
        """Shape and type of an array, from its header; None if it is no array."""
        if node.is_chunked_array:
            shape = self.load(node.children["shape"])
            first = self.array_type(node.children["chunks"].children["0"])
            return tuple(int(shape[str(axis)]) for axis in range(len(shape))), first[1] if first else "?"
        head = self._bytes(node.start, min(node.end, node.start + _HEADER))
        # Extension types have a head of 2 bytes (fixed lengths), or of the length's bytes and two more.
        size = 2 if 0xD4 <= head[0] <= 0xD8 else {0xC7: 3, 0xC8: 4, 0xC9: 6}.get(head[0])
        if size is None or head[size - 1] != _NDARRAY:
            return None
        unpacker = msgpack.Unpacker()
        unpacker.feed(head[size:])
        unpacker.read_array_header()
        return tuple(int(extent) for extent in unpacker.unpack()), str(unpacker.unpack())

    def _bytes(self, start: int, end: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _node(self, unpacker: msgpack.Unpacker, path: tuple[str, ...]) -> Node:
        start = unpacker.tell()
        children = None
        if path in self._skipped:
            unpacker.skip()
        else:
            try:
                count = unpacker.read_map_header()
            except msgpack.exceptions.UnpackValueError:  # not a map
                unpacker.skip()
            else:
                children = {}
                for _ in range(count):
                    key = str(unpacker.unpack())
                    children[key] = self._node(unpacker, (*path, key))
        return Node(start, unpacker.tell(), children)
