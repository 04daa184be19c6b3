"""Detection of git-lfs pointers, which git leaves in place of large files if git-lfs is not installed."""

import pathlib

from endistill_jax.core.errors import UserError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: pathlib.Path) -> None:
    """Checks the first bytes of a file.

    Raises:
        UserError: if it is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            raise UserError(f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its folder")
