"""What ends a program with one line: a mistake of the user, and what is none."""

import contextlib
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """A mistake in a setting, a file or a command, told in one line.

    The message says what is wrong, where, and what would be right. Programs print it alone, without a traceback, and
    exit with a non-zero code.
    """


class HostMissing(Exception):
    """Another host of the run did not come in time, told in one line: no mistake, and the next start may do better."""


class StorageFailure(Exception):
    """Storage that is there could not be read, told in one line: no mistake, and the next start may do better."""


class Stopped(Exception):
    """A run was asked to stop, saved where it was, and ended before its last step.

    Attributes:
        signal_number: the signal that asked.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


@contextlib.contextmanager
def naming(where: str, advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Says in which of several parts something went wrong, or was stopped.

    Args:
        where: the part, before the message.
        advice: says what would help, after the message of a mistake; asked only then.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" + (f"; {advice()}" if advice else "")) from error
    except Stopped as stopped:
        raise Stopped(f"{where}: {stopped}", stopped.signal_number) from stopped
