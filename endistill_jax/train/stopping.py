"""Graceful shutdown: SIGTERM and SIGINT are noted, and the training loop stops after saving."""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """Context in which the first SIGTERM or Ctrl-C is only noted; a second one acts as usual.

    A signal that was ignored at process start stays ignored, such as Ctrl-C in a background job of a script (`&`): the
        script forwards it as SIGTERM, which would otherwise count as the second.

    Attributes:
        number: the first signal received; None before that.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)):
        self._signals = signals
        self._before: dict[signal.Signals, object] = {}
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        try:
            handled = [number for number in self._signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._request) for number in handled}
        except ValueError:  # only the main thread may set handlers
            self._before = {}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
