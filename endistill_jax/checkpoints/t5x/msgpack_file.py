"""Lazy reader of Flax msgpack files: lists the content without loading arrays."""

import dataclasses
from typing import Any

import msgpack
import numpy as np
from etils import epath
from flax import serialization

from endistill_jax.core.errors import UserError

_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY = 1  # Flax's extension type
_HEADER = 256  # bytes that surely hold the shape and type of an array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A value in a msgpack file.

    Attributes:
        start: its first byte in the file.
        end: the byte after its last.
        children: the values of a map by key; None if it is something else, or was skipped.
    """

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
    """The values of a msgpack file, by place."""

    def __init__(self, path: epath.Path, skipped: tuple[tuple[str, ...], ...] = ()):
        """Indexes the file.

        Args:
            path: the file.
            skipped: keys under which nothing is looked at.

        Raises:
            UserError: if it is not a whole msgpack map.
        """
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
            raise UserError(f"{path} is no checkpoint: it holds no msgpack map")

    def load(self, node: Node) -> Any:
        """A value, arrays as NumPy arrays.

        Raises:
            UserError: if it is damaged.
        """
        try:
            return serialization.msgpack_restore(self._bytes(node.start, node.end))
        except Exception as error:  # noqa: BLE001 - whatever a damaged file brings msgpack, Flax and NumPy to
            raise UserError(f"{self.path} is damaged at byte {node.start} ({type(error).__name__})") from error

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
        try:
            unpacker.read_array_header()
            return tuple(int(extent) for extent in unpacker.unpack()), str(unpacker.unpack())
        except (msgpack.exceptions.UnpackException, ValueError, TypeError) as error:
            raise UserError(f"{self.path} is damaged at byte {node.start} ({type(error).__name__})") from error

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
        return Node(start=start, end=unpacker.tell(), children=children)


def float_type(name: str) -> np.dtype | None:
    """A floating-point type by its name, None if it is none of those that weights are stored in."""
    try:
        found = np.dtype(name)
    except TypeError:
        return None
    return found if found.name in ("float64", "float32", "float16", "bfloat16") else None
