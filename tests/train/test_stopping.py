"""The first signal is noted, the second one acts as usual, and afterwards everything is as it was."""

import signal
import threading

import pytest

from endistill_jax.train.progress import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def usual():
    """Handlers of the test's own, so that a signal that acts as usual can be seen; undone afterwards."""
    seen = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_only_noted_and_the_second_acts_as_usual(usual, number):
    with StopSignal() as stop:
        assert stop.number is None
        signal.raise_signal(number)
        assert stop.number == number and usual == []
        signal.raise_signal(number)
        assert usual == [number]


def test_second_signal_may_be_the_other_one(usual):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGTERM and usual == [signal.SIGINT]


@pytest.mark.parametrize("asked", [False, True])
def test_handlers_are_as_before_afterwards_even_after_an_error(usual, asked):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError, match="step failed"), StopSignal():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        if asked:
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("step failed")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert usual == []


def test_outside_the_main_thread_nothing_is_changed():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def run():
        with StopSignal() as stop:
            seen.append((stop.number, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_signal_that_is_ignored_stays_so_and_is_no_first_one(usual):
    """Ctrl-C reaches what a script started with `&` too, before the SIGTERM by which the script hands it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM and usual == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
