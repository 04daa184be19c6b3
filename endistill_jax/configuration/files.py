"""Where gin files are found, and what those that come with the package are for."""

import difflib
import pathlib
from collections.abc import Iterable, Sequence

from endistill_jax.core.errors import UserError

# In a checkout a link to the folder beside the package, in an installation a folder of its own.
PACKAGE_FOLDER = pathlib.Path(__file__).resolve().parent.parent


def find(name: str, search_paths: Sequence[str] = (), *, asked_by: str = "") -> pathlib.Path:
    """The gin file that `name` stands for.

    Relative names are looked up in the current folder, then in `search_paths`, then in the installed package, which has
    `gin/miniend_demo.gin`, `gin/paths/minend.gin` and so on.

    Args:
        name: a path, absolute or relative.
        search_paths: folders, in order.
        asked_by: prefix of the message of an error, such as the file and line of an include statement.

    Raises:
        UserError: no such file; the message lists names that are like it.
    """
    path = pathlib.Path(name).expanduser()
    folders = [pathlib.Path(), *(pathlib.Path(folder).expanduser() for folder in search_paths), PACKAGE_FOLDER]
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    place = f"{asked_by}: " if asked_by else ""
    if any((folder / path).is_dir() for folder in folders):
        raise UserError(f"{place}{name} is a folder; give a gin file in it")
    near = near_names(name, search_paths)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(shipped())}"
    raise UserError(f"{place}no gin file {name}; {hint}")


def near_names(name: str, search_paths: Sequence[str] = ()) -> list[str]:
    """Up to three names of gin files that can be found and are like `name`."""
    path = pathlib.Path(name).expanduser()
    known = list(map(str, sorted(path.parent.glob("*.gin"))))
    for folder in map(pathlib.Path, search_paths):
        known += _names(folder.glob("**/*.gin"), folder)
    known += _names((PACKAGE_FOLDER / "gin").glob("**/*.gin"), PACKAGE_FOLDER)
    known = list(dict.fromkeys(known))
    same_base = [other for other in known if pathlib.Path(other).stem == path.stem]
    near_base = difflib.get_close_matches(path.stem, [pathlib.Path(other).stem for other in known], n=3, cutoff=0.75)
    same_base += [other for stem in near_base for other in known if pathlib.Path(other).stem == stem]
    return list(dict.fromkeys(same_base + difflib.get_close_matches(name, known, n=3, cutoff=0.8)))[:3]


def shipped() -> list[str]:
    """Names of the gin files of the package that run by themselves, as a user gives them."""
    folder = PACKAGE_FOLDER / "gin"
    folders = (".", "runs", "studies", "miniend_3b")
    return _names([file for name in folders for file in (folder / name).glob("*.gin")], PACKAGE_FOLDER)


def _names(found: Iterable[pathlib.Path], folder: pathlib.Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in sorted(found)]


def purpose(name: str) -> str:
    """The first line of a shipped file's header."""
    with open(PACKAGE_FOLDER / name, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()
