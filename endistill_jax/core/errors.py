"""Exceptions that end a program with a one-line message and no traceback."""

import contextlib
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """A mistake in a setting, a file or a command.

    The one-line message says what is wrong, where, and what would be right. Programs print it without a traceback and
        exit with a non-zero code.
    """


class HostMissing(Exception):
    """Another host of the run did not arrive in time; not the user's mistake, and a restart may succeed."""


class StorageFailure(Exception):
    """Storage could not be reached; not the user's mistake, and a restart may succeed."""


class Stopped(Exception):
    """A run was asked to stop, saved where it was, and ended before its last step.

    Attributes:
        signal_number: the signal that was received.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def naming(where: str, advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Adds to an error or interruption in which of several parts it happened.

    Args:
        where: the part, put before the message.
        advice: returns what would help, put after the message of a `UserError`; called only then.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" + (f"; {advice()}" if advice else "")) from error
    except Stopped as stopped:
        raise Stopped(f"{where}: {stopped}", stopped.signal_number) from stopped
