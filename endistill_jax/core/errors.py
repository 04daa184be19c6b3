"""Errors that end a program with one line and no traceback, and the checks of settings that raise them."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

DTYPES = ("float32", "bfloat16")  # of parameters and computations


class UserError(ValueError):
    """A mistake in a setting, a file or a command; programs print it without a traceback and exit with an error code.

    The one-line message says what is wrong, where, and what would be right.
    """


class HostMissing(Exception):
    """Another host of the run did not arrive in time; not the user's mistake, and a restart may succeed."""


class StorageFailure(Exception):
    """Storage could not be reached; not the user's mistake, and a restart may succeed."""


class Stopped(Exception):
    """A run was asked to stop by a signal, saved where it was, and ended before its last step."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def naming(where: str, advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Adds to an error or interruption in which of several parts it happened, and to a `UserError` what would help."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" + (f"; {advice()}" if advice else "")) from error
    except Stopped as stopped:
        raise Stopped(f"{where}: {stopped}", stopped.signal_number) from stopped


def as_tuple(value: Any, where: str, wanted: str, fits: Callable[[Any], bool] = lambda _: True) -> tuple[Any, ...]:
    """Validates a setting that lists things and returns it as a tuple; each item must fit.

    Gin accepts a scalar, or `(3)`, where a tuple is meant; this refuses it, with the setting's name, `where`, and what
    is `wanted`, such as "layers, such as (0, 3) or (3,)".
    """
    if not isinstance(value, (tuple, list)) or not all(map(fits, value)):
        raise UserError(f"{where} is {value!r}; give a tuple of {wanted}")
    return tuple(value)


def whole_numbers(value: Any, where: str) -> tuple[int, ...]:
    """A setting that lists non-negative integers, such as seeds; on a command line `0,1` is a string."""
    return as_tuple(value, where, "whole numbers, such as '(0, 1)' or '(3,)'", is_whole)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer (not a bool or float) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0 (not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def require(settings: Any, name: str, fits: bool, wanted: str) -> None:
    """Raises unless a setting of a dataclass is valid, with its name, its value, and what would be right."""
    if not fits:
        raise UserError(f"{type(settings).__name__}.{name} is {getattr(settings, name)!r}; {wanted}")


def require_choice(settings: Any, **choices: Iterable[Any]) -> None:
    for name, allowed in choices.items():
        allowed = tuple(allowed)
        require(settings, name, getattr(settings, name) in allowed, f"choose one of {', '.join(map(str, allowed))}")


def require_positive(settings: Any, *names: str) -> None:
    for name in names:
        require(settings, name, is_positive(getattr(settings, name)), "it must be a finite number above 0")


def require_not_negative(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(settings, name, value == 0 or is_positive(value), "it must be a finite number, 0 or more")


def require_at_least(settings: Any, least: int, *names: str) -> None:
    for name in names:
        fits = is_whole(getattr(settings, name), least)
        require(settings, name, fits, f"it must be a whole number of at least {least}")


def require_between(settings: Any, name: str, low: float, high: float, *, open_ends: bool = False) -> None:
    value = getattr(settings, name)
    fits = low < value < high if open_ends else low <= value <= high
    wanted = f"it must be between {low} and {high}" if open_ends else f"it must be from {low} to {high}"
    require(settings, name, fits, wanted)
