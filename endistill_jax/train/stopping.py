"""Stopping a run without losing it: SIGTERM and SIGINT ask, the loop answers when it has saved."""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """While it is entered, the first SIGTERM or Ctrl-C is only noted; a second one acts as usual.

    A signal that the process was started to ignore stays ignored, as Ctrl-C is by what a script runs with `&`: that
    script hands it on as SIGTERM, which would else be the second.

    Attributes:
        number: the signal that came, None as long as none did.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)):
        self._signals = signals
        self._before: dict[signal.Signals, object] = {}
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        try:
            heard = [number for number in self._signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._request) for number in heard}
        except ValueError:  # only the main thread may set handlers; elsewhere signals act as usual
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
