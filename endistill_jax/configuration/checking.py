"""Mistakes that show in gin files before anything is called: names, scopes, missing values, values of a wrong type."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from endistill_jax.configuration.reading import Binding, Macro, Reading, Reference
from endistill_jax.core.errors import UserError

REQUIRED = Macro("gin.REQUIRED")
SIMPLE_TYPES = (int, float, str, bool, type(None))


def check(reading: Reading, *, whole: bool = True) -> None:
    """Refuses what gin would find late, or never.

    Args:
        reading: of all files and flags.
        whole: nothing may be left open; False for a file that only some values are taken from.

    Raises:
        UserError: with its place: a function, class or parameter that does not exist; a macro that is used and not set,
            or set and misspelt; a required value that is missing; a scope that no reference has; a value of a wrong
            type for its parameter.
    """
    targets = {
        id(binding): resolve(binding.selector, binding.symbols, binding.place)
        for binding in reading.bindings
        if binding.parameter
    }
    for binding in reading.bindings:
        if binding.parameter:
            _check_parameter(binding, targets[id(binding)])
    references = [
        (reference, resolve(reference.selector, binding.symbols, binding.place), binding)
        for binding in reading.bindings
        for reference in _find(binding.value, Reference)
    ]
    macros = {binding.macro_name: binding for binding in reading.bindings if not binding.parameter}
    final = {
        (binding.scope, targets[id(binding)], binding.parameter): binding
        for binding in reading.bindings
        if binding.parameter
    }
    used = {
        macro.name: binding
        for binding in reversed(reading.bindings)
        for macro in _find(binding.value, Macro)
        if macro != REQUIRED
    }
    _check_used(macros, used)
    _check_scopes(final.values(), references, macros)
    if whole:
        _check_set(macros, used)
        _check_required(macros, final)
        _check_complete(references, final)
    for (_, target, _), binding in final.items():
        _check_type(target, binding, macros)


def closest(name: str, names: Iterable[str]) -> str:
    """A hint for a name that does not exist."""
    names = sorted(names)
    if not names:
        return "there is none"
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there is {', '.join(names)}" if len(names) <= 20 else f"there are {len(names)} others"


def _find(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _find(item, kind)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _find(item, kind)


def resolve(selector: str, symbols: Mapping[str, Any], place: str) -> Any:
    """The function or class that a dotted name stands for, by the imports of its file.

    Raises:
        UserError: there is none of that name.
    """
    first, *rest = selector.split(".")
    if first not in symbols:
        raise UserError(f"{place}: {selector}: {first} is not imported; {closest(first, symbols)}")
    target = symbols[first]
    for name in rest:
        if not hasattr(target, name):
            names = [other for other, value in vars(target).items() if callable(value) and other[0] != "_"]
            raise UserError(f"{place}: {selector}: there is no {name}; {closest(name, names)}")
        target = getattr(target, name)
    if not callable(target):
        raise UserError(f"{place}: {selector} is not a function or a class")
    return target


def has_parameter(target: Any, name: str) -> bool:
    """Whether a function or class has a parameter of that name."""
    return name in (_parameters(target) or ())


def _parameters(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """None for something that does not tell, as some built-in classes."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return None


def _check_parameter(binding: Binding, target: Any) -> None:
    parameters = _parameters(target)
    if parameters is None:
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if binding.parameter not in parameters:
        raise UserError(
            f"{binding.place}: {binding.selector} has no parameter {binding.parameter}; "
            f"{closest(binding.parameter, parameters)}"
        )


def _check_used(macros: dict[str, Binding], used: dict[str, Binding]) -> None:
    for name, binding in macros.items():
        if name in used:
            continue
        # A file may set what its runs use now and then; a flag that nothing uses, or a near miss, is a mistake.
        near = difflib.get_close_matches(name, used, n=1, cutoff=0.8)
        if near or binding.place.startswith("--"):
            raise UserError(f"{binding.place}: nothing uses {name}; {closest(name, used)}")


def _check_set(macros: dict[str, Binding], used: dict[str, Binding]) -> None:
    for name, binding in used.items():
        if name not in macros:
            raise UserError(
                f"{binding.place}: %{name} is not set; give --gin.{name}=..., or set it in a gin file"
                + (f" ({near})" if (near := closest(name, macros)).startswith("did") else "")
            )


def _check_scopes(
    final: Iterable[Binding], references: list[tuple[Reference, Any, Binding]], macros: Iterable[str]
) -> None:
    scopes = [reference.scope for reference, _, _ in references]
    # What a macro refers to is called in a scope of the macro's name; so gin writes it in an operative configuration.
    used = {scope for nested in (*scopes, *macros) for scope in nested.split("/") if scope}
    for binding in final:
        for scope in filter(None, binding.scope.split("/")):
            if scope not in used:
                raise UserError(
                    f"{binding.place}: nothing uses the scope {scope} of {scope}/{binding.selector}; "
                    f"{closest(scope, used)}"
                )


def _check_required(macros: dict[str, Binding], final: dict[Any, Binding]) -> None:
    missing = {name: binding for name, binding in macros.items() if binding.value == REQUIRED}
    for binding in final.values():
        if binding.value == REQUIRED:
            missing[f"{binding.macro_name}.{binding.parameter}"] = binding
    if missing:
        flags = [
            f"--gin.{name}=..." + (f" ({binding.comment})" if binding.comment else "")
            for name, binding in missing.items()
        ]
        raise UserError(f"{', '.join(missing)} must be set: give {', '.join(flags)}")


def _check_type(target: Any, binding: Binding, macros: dict[str, Binding]) -> None:
    value, place = binding.value, binding.place
    name = f"{binding.selector}.{binding.parameter}"
    while isinstance(value, Macro) and value.name in macros:
        name, place, value = f"{value.name} ({name})", macros[value.name].place, macros[value.name].value
    if not isinstance(value, (Reference, Macro)):
        check_value(target, binding.parameter, value, f"{place}: {name}")


def check_value(target: Any, parameter: str, value: Any, where: str) -> None:
    """Refuses a value that its parameter's annotation, if it is one of plain types and settings, does not allow.

    Args:
        target: the function or class.
        parameter: its parameter.
        value: what it is to be, no reference.
        where: what to call it in the message.

    Raises:
        UserError: naming the value and the types.
    """
    try:
        annotation = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)[parameter]
    except (NameError, TypeError, KeyError):
        return  # an annotation that cannot be read, or none
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    allowed = typing.get_args(annotation) if union else (annotation,)
    settings = tuple(kind for kind in allowed if dataclasses.is_dataclass(kind))
    if not all(kind in SIMPLE_TYPES or kind in settings for kind in allowed):
        return
    if type(value) in allowed or isinstance(value, settings) or (type(value) is int and float in allowed):
        return
    expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
    raise UserError(f"{where} is {value!r}; it must be {expected}")


def missing_parameters(target: Any, bound: Container[str]) -> list[str]:
    """The parameters of a function or class that have no default and are not bound."""
    return [
        name
        for name, parameter in (_parameters(target) or {}).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in bound
    ]


def _check_complete(references: list[tuple[Reference, Any, Binding]], final: dict[Any, Binding]) -> None:
    """Refuses a reference to something whose parameters without a default are bound nowhere."""
    bound: dict[Any, set[str]] = {}
    for _, target, parameter in final:
        bound.setdefault(target, set()).add(parameter)
    for reference, target, binding in references:
        missing = missing_parameters(target, bound.get(target, ()))
        # A function that is passed on, not called, may get its arguments from whoever calls it.
        if missing and (reference.evaluate or binding.parameter == "job"):
            raise UserError(
                f"{binding.place}: {reference.selector} needs {', '.join(missing)}; "
                f"give --gin.{reference.selector}.{missing[0]}=..., or set it in a gin file"
            )
