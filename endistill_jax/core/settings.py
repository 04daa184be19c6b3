"""Settings that list things: in a gin file a single thing, or (3), is no tuple, and nothing says so by itself."""

import math
from collections.abc import Callable
from typing import Any

from endistill_jax.core.errors import UserError


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
