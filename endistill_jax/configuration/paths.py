"""The path that a file of gin/paths/ gives, beside the configuration that is read: a study compares several."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from endistill_jax.configuration.checking import check_value, closest
from endistill_jax.configuration.values import FileValues
from endistill_jax.core.errors import UserError
from endistill_jax.objectives import Path


def from_file(
    file: str,
    relation_heads: int | None = None,
    changes: Mapping[str, Any] | None = None,
    search_paths: Sequence[str] = (),
) -> Path:
    """Reads a path from a gin file that sets PATH; what a run binds of its own path has no part in it.

    Args:
        file: such as gin/paths/minend.gin.
        relation_heads: of every site, where the file leaves RELATION_HEADS open.
        changes: dotted names -> values that differ from the file's: {"cross.teacher_layer": -2, "lm_weight": 0.1}.
        search_paths: folders in which the file is looked up too; those of the command, where gin calls this.

    Raises:
        UserError: no such file, a mistake in it, it sets no path, or has nothing of a name that is changed, or
            changes are no mapping.
    """
    if not isinstance(changes, Mapping | None):
        raise UserError(f"{file}: changes is {changes!r}; give names and values, such as {{'cross.teacher_layer': -2}}")
    given = {} if relation_heads is None else {"RELATION_HEADS": relation_heads}
    path = FileValues(file, search_paths, given).macro("PATH")
    if not isinstance(path, Path):
        raise UserError(f"{file}: PATH is {path!r}, which is no path; give a file such as those of gin/paths/")
    for name, value in (changes or {}).items():
        path = _changed(path, name.split("."), value, f"{file}: changes of {name}")
    return path


def _changed(settings: Any, name: list[str], value: Any, where: str) -> Any:
    if not dataclasses.is_dataclass(settings):
        raise UserError(f"{where}: what holds {name[0]} is {settings!r} in this path; change a site that it compares")
    fields = [field.name for field in dataclasses.fields(settings)]
    if name[0] not in fields:
        raise UserError(f"{where}: there is no {name[0]}; {closest(name[0], fields)}")
    if name[1:]:
        value = _changed(getattr(settings, name[0]), name[1:], value, where)
    check_value(type(settings), name[0], value, f"{where}: {name[0]}")
    return dataclasses.replace(settings, **{name[0]: value})
