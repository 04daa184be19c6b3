"""Reading gin files into statements with their places, following includes; gin itself sees only what passed here.

Gin finds some mistakes late and tells them in many lines, or not at all: a macro that nothing uses, a scope that no
reference has. So files are read twice: here, to check them as a whole, and by gin, to bind.
"""

import dataclasses
import importlib
import io
import pathlib
import tokenize
from collections.abc import Iterator, Sequence
from typing import Any

from endistill_jax.configuration import files
from endistill_jax.core.errors import UserError
from gin import config_parser

DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/selector` or, evaluated, `@scope/selector()`."""

    scope: str
    selector: str
    evaluate: bool


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binding:
    """One binding of a value.

    Attributes:
        scope: scope of the binding, slashes between nested ones.
        selector: the configurable, or the macro's name when `parameter` is empty.
        parameter: the configurable's parameter.
        value: with `Reference` and `Macro` in it.
        symbols: names that the file had imported there.
        place: file and line, or the flag, for messages.
        comment: what the file says behind the binding.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    symbols: dict[str, Any]
    place: str
    comment: str

    @property
    def macro_name(self) -> str:
        return f"{self.scope}/{self.selector}" if self.scope else self.selector


@dataclasses.dataclass(kw_only=True)
class Reading:
    """What all files and flags of a command say, in order.

    Attributes:
        bindings: of parameters and macros.
        chunks: texts for `gin.parse_config`: the files in order, includes taken out and put where they belong.
        imports: import statement -> (name it binds, module), over all files.
    """

    bindings: list[Binding] = dataclasses.field(default_factory=list)
    chunks: list[str] = dataclasses.field(default_factory=list)
    imports: dict[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)


class _Placeholders(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def read_file(reading: Reading, name: str, search_paths: Sequence[str], *, asked_by: str = "", within=()) -> None:
    """Adds a file and the files it includes to `reading`.

    Raises:
        UserError: with file and line: syntax, a file or a module that is not there, files that include each other.
    """
    path = files.find(name, search_paths, asked_by=asked_by)
    if path in within:
        raise UserError(f"{asked_by}: {name} includes itself, through {' -> '.join(map(str, [*within, path]))}")
    text = _read_text(path)
    lines = text.splitlines()
    symbols: dict[str, Any] = {}
    prelude: list[str] = []
    begin = 0
    for statement in statements(text, str(path)):
        place = f"{path}:{statement.location.line_num}"
        match statement:
            case config_parser.IncludeStatement():
                end = statement.location.line_num
                reading.chunks.append("\n".join([*prelude, *lines[begin : end - 1]]))
                begin, prelude = end, [line for line, _ in symbols.values()]
                read_file(reading, statement.filename, search_paths, asked_by=place, within=(*within, path))
            case config_parser.ImportStatement():
                _import(reading, symbols, statement, place)
            case config_parser.BindingStatement():
                reading.bindings.append(_binding(statement, symbols, place))
            case config_parser.BlockDeclaration():
                pass  # its bindings follow as statements of their own
    reading.chunks.append("\n".join([*prelude, *lines[begin:]]))


def read_flag(reading: Reading, name: str, value: str) -> None:
    """Adds `--gin.NAME=value` to `reading`; names are those that the files import.

    Raises:
        UserError: the name or the value cannot be read.
    """
    text = f"{name} = {value}"
    symbols = {bound: (line, module) for line, (bound, module) in reading.imports.items()}
    for statement in statements(text, f"--gin.{name}", lines=False):
        if not isinstance(statement, config_parser.BindingStatement):
            raise UserError(f"--gin.{name}: not the name of a macro or of a parameter")
        reading.bindings.append(_binding(statement, symbols, f"--gin.{name}"))
    reading.chunks.append("\n".join([DYNAMIC_REGISTRATION, *reading.imports, text]))


def statements(text: str, name: str, *, lines: bool = True) -> Iterator[Any]:
    """The statements of a gin text, references unresolved.

    Raises:
        UserError: syntax, with `name` and, if `lines`, the line.
    """
    place, line = name, 0
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _Placeholders())
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise UserError(f"{place}:{line}: {message}" if lines else f"{place}: {message}") from None
    except SyntaxError as error:
        message, line = _plain(error), error.lineno
        shown = (error.text or "").strip()
        raise UserError(f"{place}:{line}: {message} in: {shown}" if lines else f"{place}: {message}") from None


def _plain(error: SyntaxError) -> str:
    token = error.msg.rpartition("Failed to parse token ")[2] if "Failed to parse token" in error.msg else ""
    if token:
        return f"{token} is not a value (a string needs quotes, a macro %, a function or class @)"
    return error.msg.splitlines()[0].rstrip(".")


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None


def _import(reading: Reading, symbols: dict[str, Any], statement: config_parser.ImportStatement, place: str) -> None:
    if statement.module.startswith("__gin__."):
        if statement.module != "__gin__.dynamic_registration":
            raise UserError(f"{place}: gin has no feature {statement.module}; there is dynamic_registration")
        if symbols:
            raise UserError(f"{place}: `{DYNAMIC_REGISTRATION}` must come once, before a file's imports")
        symbols["gin"] = (DYNAMIC_REGISTRATION, importlib.import_module("gin.config"))
        return
    if "gin" not in symbols:
        raise UserError(f"{place}: before its first import a file needs the line `{DYNAMIC_REGISTRATION}`")
    try:
        module = importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
        # A module that is there and lacks something itself is no mistake of this file.
        if error.name is None or not f"{statement.module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{place}: there is no module {statement.module}") from None
    if not (statement.is_from or statement.alias):
        module = importlib.import_module(statement.bound_name())
    symbols[statement.bound_name()] = (statement.format(), module)
    reading.imports[statement.format()] = (statement.bound_name(), module)


def _binding(statement: config_parser.BindingStatement, symbols: dict[str, Any], place: str) -> Binding:
    macro = not statement.arg_name
    return Binding(
        scope=statement.scope,
        selector=statement.selector,
        parameter="" if macro else statement.arg_name,
        value=statement.value,
        symbols={name: module for name, (_, module) in symbols.items()},
        place=place,
        comment=statement.location.line_content.partition("#")[2].strip(),
    )
