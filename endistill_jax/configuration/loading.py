"""Loading: files and flags in, one job out."""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import gin
from endistill_jax.configuration.checking import REQUIRED, check, has_parameter, resolve
from endistill_jax.configuration.files import find
from endistill_jax.configuration.reading import Reading, read_file, read_flag
from endistill_jax.core.errors import UserError
from endistill_jax.planning.flags import left_open

SEARCH_PATHS = "search_paths"
# A value that begins so is gin's; anything else that is no Python literal is a string.
GIN_VALUE_BEGINS = tuple("@%([{'\"")


def load(
    gin_files: Sequence[str],
    flags: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
    *,
    planning: bool = False,
) -> Callable[..., Any]:
    """Reads, checks and binds a configuration, in place of any earlier one.

    Args:
        gin_files: names of files, see `files.find`; later ones win.
        flags: (name, value) of each `--gin.NAME=value`; they win over files.
        search_paths: folders in which files, included ones too, are looked up.
        planning: the job will only be planned: folders, checkpoints and tasks may be left open.

    Returns:
        `jobs.run`, configured: call it to run the job that `jobs.run.job` names.

    Raises:
        UserError: any mistake that can be seen before the job is called.
    """
    for name in gin_files:
        find(name, search_paths)  # all names first: importing what a file needs takes seconds
    reading = Reading()
    for name in gin_files:
        read_file(reading, name, search_paths)
    for name, value in flags:
        read_flag(reading, name, flag_value(value))
    if planning:
        _fill_places(reading)
    from endistill_jax import jobs

    if not any(binding.parameter == "job" for binding in reading.bindings):
        raise UserError(
            f"{', '.join(gin_files)}: no job to run; "
            "a gin file must end with a line such as `jobs.run.job = @jobs.distill`"
        )
    _hand_on(search_paths, reading)
    check(reading)
    gin.clear_config()
    for chunk in reading.chunks:
        gin.parse_config(chunk)
    gin.finalize()
    return gin.get_configurable(jobs.run)


def _fill_places(reading: Reading) -> None:
    """Macros that must be set and are not get their own name, and no task is made: a plan reads nothing."""
    macros = {binding.macro_name: binding.value for binding in reading.bindings if not binding.parameter}
    for name, value in macros.items():
        if value == REQUIRED:
            read_flag(reading, name, repr(left_open(name)))
    if any((binding.selector, binding.parameter) == ("jobs.Data", "task") for binding in reading.bindings):
        read_flag(reading, "jobs.Data.task", repr(left_open("TASK")))


def _hand_on(search_paths: Sequence[str], reading: Reading) -> None:
    """What reads a gin file of its own, for one value, looks it up in the same folders."""
    own = {binding.selector for binding in reading.bindings if binding.parameter == SEARCH_PATHS}
    others = {b.selector: b for b in reading.bindings if b.parameter and b.selector not in own}
    for selector, binding in others.items() if search_paths else ():
        if has_parameter(resolve(selector, binding.symbols, binding.place), SEARCH_PATHS):
            read_flag(reading, f"{selector}.{SEARCH_PATHS}", repr(tuple(search_paths)))


def flag_value(text: str) -> str:
    """Gin's form of what stands behind `--gin.NAME=`: paths and names need no quotes there."""
    if text.startswith(GIN_VALUE_BEGINS):
        return text
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return repr(text)
    return repr(value) if isinstance(value, (bool, int, float, type(None))) else repr(text)


def config_text() -> str:
    """What the job was called with, as a gin file that runs it again. Complete once the job has begun."""
    return f"{gin.operative_config_str(max_line_length=100).rstrip()}\n"


def bound_settings() -> dict[str, str]:
    """Every parameter and macro that files and flags set, by name, with its value as gin writes it."""
    lines = gin.config_str(max_line_length=1 << 20).splitlines()
    bindings = (line.partition(" = ") for line in lines if not line.startswith("#"))
    return {name: value for name, equals, value in bindings if equals}
