"""What ends a program with one line: a mistake of the user, and what is none."""


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
