"""Pointers that git leaves in the place of large files if it is run without its extension git-lfs."""

import pathlib

from endistill_jax.core.errors import UserError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: pathlib.Path) -> None:
    """Looks at the first bytes of a file.

    Raises:
        UserError: if it is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            raise UserError(f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder")
