"""Settings that list things: in a gin file a single thing, or (3), is no tuple, and nothing says so by itself."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from endistill_jax.core.errors import UserError

DTYPES = ("float32", "bfloat16")  # of parameters and computations


def as_tuple(value: Any, where: str, wanted: str, fits: Callable[[Any], bool] = lambda _: True) -> tuple[Any, ...]:
    """A setting that lists things, as a tuple.

    Args:
        value: what the user gave.
        where: the setting's name, for the message.
        wanted: what it lists and how that is written, such as "layers, such as (0, 3) or (3,)".
        fits: whether a thing may be in the list.

    Raises:
        UserError: no tuple or list, or something in it does not fit.
    """
    if not isinstance(value, (tuple, list)) or not all(map(fits, value)):
        raise UserError(f"{where} is {value!r}; give a tuple of {wanted}")
    return tuple(value)


def whole_numbers(value: Any, where: str) -> tuple[int, ...]:
    """A setting that lists whole numbers from 0, such as seeds; on a command line `0,1` is a text.

    Raises:
        UserError: anything else.
    """
    return as_tuple(value, where, "whole numbers, such as '(0, 1)' or '(3,)'", is_whole)


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer, no bool and no float, and not less than `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def require(settings: Any, name: str, fits: bool, wanted: str) -> None:
    """A setting of a dataclass must be as it is said.

    Raises:
        UserError: naming the setting, its value, and what would be right.
    """
    if not fits:
        raise UserError(f"{type(settings).__name__}.{name} is {getattr(settings, name)!r}; {wanted}")


def require_choice(settings: Any, **choices: Iterable[Any]) -> None:
    """Each of the named settings must be one of its choices."""
    for name, allowed in choices.items():
        allowed = tuple(allowed)
        require(settings, name, getattr(settings, name) in allowed, f"choose one of {', '.join(map(str, allowed))}")


def require_positive(settings: Any, *names: str) -> None:
    """Each of the named settings must be a finite number above 0."""
    for name in names:
        require(settings, name, is_positive(getattr(settings, name)), "it must be a finite number above 0")


def require_not_negative(settings: Any, *names: str) -> None:
    """Each of the named settings must be a finite number, 0 or more."""
    for name in names:
        value = getattr(settings, name)
        require(settings, name, value == 0 or is_positive(value), "it must be a finite number, 0 or more")


def require_at_least(settings: Any, least: int, *names: str) -> None:
    """Each of the named settings must be a whole number of at least `least`."""
    for name in names:
        require(
            settings, name, is_whole(getattr(settings, name), least), f"it must be a whole number of at least {least}"
        )


def require_between(settings: Any, name: str, low: float, high: float, *, open_ends: bool = False) -> None:
    """A setting must be a number between two others."""
    value = getattr(settings, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and (low < value < high if open_ends else low <= value <= high)
    wanted = f"it must be between {low} and {high}" if open_ends else f"it must be from {low} to {high}"
    require(settings, name, fits, wanted)
