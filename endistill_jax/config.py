"""Parses gin files and flags into one job, and rejects mistakes that gin would miss."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gin
from endistill_jax.command_line import find
from endistill_jax.core.errors import UserError
from endistill_jax.planning.options import left_open
from gin import config as gin_config
from gin import config_parser

MACRO, CONSTANT, REQUIRED = "gin.macro", "gin.constant", "gin.REQUIRED"
GIN_FOLDER = os.path.dirname(gin.__file__)
SIMPLE_TYPES = (int, float, str, bool, type(None))

# Scope, selector and parameter. A macro is the parameter "value" of gin.macro, with its name for a scope.
Key = tuple[str, str, str]
_read: dict[str, Sequence] = {"files": (), "flags": (), "search_paths": ()}  # what gin holds, for messages


def read(
    gin_files: Sequence[str],
    flags: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
    *,
    planning: bool = False,
) -> None:
    """Reads and checks a configuration, replacing any earlier one; `job` then builds it.

    Args:
        gin_files: names of files, see `command_line.find`; later ones win.
        flags: name and value, as gin writes it, of each `--gin.NAME=value`; they win over files.
        search_paths: folders in which files, included ones too, are looked up.
        planning: the job will only be planned: folders, checkpoints and tasks may be left open.
    """
    _read.update(files=gin_files, flags=flags, search_paths=search_paths)
    paths = [find(name, search_paths) for name in gin_files]  # all of them first: importing takes seconds
    gin.clear_config()
    for path in paths:
        with _in_one_line(str(path)):
            gin.parse_config_file(str(path))
    imports = [line for line in gin.config_str().splitlines() if line.startswith(("import ", "from "))]
    for name, value in flags:
        with _in_one_line(f"--gin.{name}"):
            gin.parse_config([*imports, f"{name} = {value}"])
    if planning:
        _leave_open()
    # Gin shows this to hooks alone, and its own hooks would refuse first, without a place.
    _check({(*key, name): value for key, values in gin_config._CONFIG.items() for name, value in values.items()})
    gin.finalize()


def job() -> Callable[..., Any]:
    """`jobs.run`, all settings of its job built: call it with `dry_run` or `plan`."""
    from endistill_jax import jobs

    with _in_one_line("", (UserError, TypeError, ValueError)):
        settings = gin.get_bindings(jobs.run)
        reference = gin.get_bindings(jobs.run, resolve_references=False)["job"]
        target = reference.configurable.wrapped
        with gin.config_scope("/".join(reference.scopes)):
            bound = functools.partial(target, **gin.get_bindings(target))
        inspect.signature(target).bind(**bound.keywords)
    return functools.partial(jobs.run, **settings | {"job": functools.update_wrapper(bound, target)})


def config_text() -> str:
    """Everything that files and flags set, as a gin file that runs the same again."""
    return f"{gin.config_str(max_line_length=100).rstrip()}\n"


def bound_settings() -> dict[str, str]:
    """Every parameter and macro that files and flags set, by name, with its value as gin writes it."""
    lines = (line.partition(" = ") for line in gin.config_str(max_line_length=1 << 20).splitlines())
    return {name: value for name, equals, value in lines if equals and not name.startswith("#")}


# For included files, before gin's own readers, of which one logs an error for each file that it does not find.
_reader = (lambda name: find(name, _read["search_paths"]).open(encoding="utf-8"), lambda name: True)
gin_config._FILE_READERS.insert(0, _reader)


def _leave_open() -> None:
    """Macros that must be set and are not get their own name, and no task is made: a plan reads nothing."""
    from endistill_jax.train.experiment import Data

    for (scope, selector), values in list(gin_config._CONFIG.items()):
        if selector == MACRO and getattr(values["value"], "scopes", None) == [REQUIRED]:
            gin.bind_parameter((scope, selector, "value"), left_open(scope))
        if "task" in values and gin_config._REGISTRY[selector].wrapped is Data:
            gin.bind_parameter((scope, selector, "task"), left_open("TASK"))


def _check(settings: dict[Key, Any]) -> None:
    """Rejects mistakes that gin would find late, or never."""
    if not any(key[2] == "job" for key in settings):
        raise UserError(f"{', '.join(_read['files'])}: no job to run; add a line like jobs.run.job = @jobs.distill")
    references = [each for each in gin_config.iterate_references(settings) if each.config_key[1] != CONSTANT]
    macros = {scope for scope, selector, _ in settings if selector == MACRO}
    used = {each.config_key[0] for each in references if each.config_key[1] == MACRO}
    scopes = macros.union(*(each.scopes for each in references))  # what a macro refers to is built in its name's scope
    for key in settings:
        # A file may set what its runs use now and then; a flag that nothing uses, or a near miss, is a mistake.
        name, by_flag = key[0], key[0] in dict(_read["flags"])
        if key[1] == MACRO and name not in used and (by_flag or _hint(name, used, 0.8) and not _uses(f"%{name}")):
            raise UserError(f"{_sets(key)[0]}: nothing uses {name}{_hint(name, used)}")
        for part in set(name.split("/")) - scopes if name and key[1] != MACRO else ():
            if not _uses(f"[@/]{part}"):
                raise UserError(f"{_sets(key)[0]}: nothing uses the scope {part} of {_name(key)}{_hint(part, scopes)}")
            gin_config._CONFIG.pop(key[:2], None)  # a later file replaced what used it
    for name in sorted(used - macros):
        hint = f"give --gin.{name}=..., or set it in a file{_hint(name, macros)}"
        raise UserError(f"{_uses(f'%{name}')}: %{name} is not set; {hint}")
    if missing := [key for key, value in settings.items() if getattr(value, "scopes", None) == [REQUIRED]]:
        flags = ", ".join(f"--gin.{_name(key)}=...{_sets(key)[1]}" for key in missing)
        raise UserError(f"{', '.join(map(_name, missing))} must be set: give {flags}")
    for key, value in settings.items():
        _check_type(key, value, settings)


def _check_type(key: Key, value: Any, settings: dict[Key, Any]) -> None:
    """Refuses a value that its parameter's annotation, if it is one of plain types and settings, does not allow."""
    target, name = gin_config._REGISTRY[key[1]].wrapped, _name(key)
    try:
        hint = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)[key[2]]
    except (NameError, TypeError, KeyError):
        return  # an annotation that cannot be read, or none
    while isinstance(value, gin_config.ConfigurableReference) and value.config_key[1] == MACRO:
        key = (*value.config_key, "value")
        value = settings[key]
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    allowed = typing.get_args(hint) if is_union else (hint,)
    plain = all(kind in SIMPLE_TYPES or dataclasses.is_dataclass(kind) for kind in allowed)
    fits = isinstance(value, gin_config.ConfigurableReference) or type(value) in allowed
    if plain and not fits and not (type(value) is int and float in allowed):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        shown = f"{key[0]} ({name})" if key[1] == MACRO else name
        raise UserError(f"{_sets(key)[0]}: {shown} is {value!r}; it must be {expected}")


def _name(key: Key) -> str:
    scope, selector, parameter = key
    short = ".".join(selector.split(".")[-2:])
    return scope if selector == MACRO else f"{scope}/{short}.{parameter}".lstrip("/")


def _hint(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(name, list(names), n=2, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class _Unresolved(config_parser.ParserDelegate):
    def configurable_reference(self, name: str, evaluate: bool) -> str:
        return f"@{name}"

    def macro(self, name: str) -> str:
        return f"%{name}"


def _statements(files: Sequence[str]) -> Iterator[tuple[Key, Any, tuple[str, str]]]:
    """Key, value, and location with comment of all bindings in files, for error messages: gin keeps no locations."""
    for path in (find(name, _read["search_paths"]) for name in files):
        with open(path, encoding="utf-8") as file:
            for each in config_parser.ConfigParser(file, _Unresolved()):
                if isinstance(each, config_parser.IncludeStatement):
                    yield from _statements([each.filename])
                elif isinstance(each, config_parser.BindingStatement):
                    macro = "/".join(filter(None, (each.scope, each.selector)))
                    key = (each.scope, each.selector, each.arg_name) if each.arg_name else (macro, MACRO, "value")
                    comment = re.search(" # (.+)", each.location.line_content)
                    place = f"{path}:{each.location.line_num}", f" ({comment[1]})" if comment else ""
                    yield key, each.value, place


def _last(fits: Callable[[Key, Any], Any]) -> tuple[str, str]:
    """Place and comment of the last statement that fits, in flags, which win, or else in files; empty if none does."""
    for name, value in reversed(_read["flags"]):
        scope, selector, parameter = config_parser.parse_binding_key(name)
        if fits((scope, selector, parameter) if parameter else (name, MACRO, "value"), value):
            return f"--gin.{name}", ""
    return next((found for *said, found in reversed([*_statements(_read["files"])]) if fits(*said)), ("", ""))


def _sets(key: Key) -> tuple[str, str]:
    return _last(lambda other, _: [part.split(".")[-1] for part in other] == [part.split(".")[-1] for part in key])


def _uses(pattern: str) -> str:
    return _last(lambda _, value: re.search(rf"{pattern}(?!\w)", str(value)))[0]


@contextlib.contextmanager
def _in_one_line(source: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turns errors of gin and Python, of several lines, into one line with the location."""
    try:
        yield
    except tokenize.TokenError as error:
        raise UserError(f"{source}: {error.args[0]}") from None
    except SyntaxError as error:
        file = source if error.filename in (None, "<tokenize>") else error.filename
        place = source if source.startswith("--") else f"{file}:{error.lineno}"
        message, _, token = error.msg.partition("\n    Failed to parse token ")
        if token:
            message = f"{token} is not a value (a string needs quotes, a macro %, a function or class @)"
        raise UserError(f"{place}: {message.rstrip('.')} in: {(error.text or '').strip()}") from None
    except RecursionError:
        raise UserError(f"{source}: its files include one another without end") from None
    except kinds as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if kinds == (Exception,) and not (isinstance(error, UserError) or last.startswith((GIN_FOLDER, "<frozen"))):
            raise  # a mistake in a module that a gin file imports
        message, _, added = str(error).partition("\n  In ")
        message = " ".join(message.split())
        if at := re.search(r'file "(.+)", line (\d+)', added):
            source = source if source.startswith("--") else f"{at[1]}:{at[2]}"
        elif argument := re.search(r"unexpected keyword argument '(\w+)'", message):
            source = _last(lambda key, _: key[2] == argument[1])[0]
        elif (called := re.search("call to configurable '(.+?)'", added)) and not isinstance(error, UserError):
            source = _uses(rf"\b{called[1]}")
        raise UserError((f"{source}: " if source else "") + _with_hint(message)) from None


def _with_hint(message: str) -> str:
    if found := re.search(r"<module '([\w.]+)'.*> has no attribute (\w+)", message):
        message = f"{found[1]} has no {found[2]}{_hint(found[2], vars(sys.modules[found[1]]))}"
    elif found := re.search(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", message):
        targets = [each.wrapped for each in gin_config._REGISTRY.get_all_matches(found[1])]
        parameters = {name for each in targets for name in inspect.signature(each).parameters}
        message = f"{found[1]} has no parameter {found[2]}{_hint(found[2], parameters)}"
    return message
