"""Stop signals are recorded, and previous handlers are restored."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from megatron_slm.runtime import signals
from megatron_slm.runtime.signals import StopSignals

STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.mark.parametrize("name", STOPPING)
def test_the_first_signal_is_recorded(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with StopSignals(announces=True) as stop:
        stop.record_all()
        assert stop.number == 0
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == getattr(signal, name)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    assert capfd.readouterr().err.startswith(f"{name} received: stopping after the step in progress")


def test_a_second_interrupt_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as stop:
        stop.record_all()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the terminal and the launcher both send one per key press
        monkeypatch.setattr(signals, "SECONDS_BETWEEN_INTERRUPTS", -1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_from_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with StopSignals(announces=True) as stop:
        stop.record_all()
        monkeypatch.setattr(os, "write", write)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP


def test_a_start_that_waits_for_other_ranks_can_be_terminated() -> None:
    """A recorded signal would have no effect until the wait of the library ends."""
    with StopSignals() as stop:
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in signals.ENDINGS)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1, "a warning, for which a job script requeues the job"


@pytest.mark.parametrize(("name", "is_recorded"), [("SIGHUP", False), ("SIGINT", False), ("SIGUSR1", True)])
def test_ignored_signals(name: str, is_recorded: bool) -> None:
    """nohup ignores SIGHUP permanently; a script ignores SIGUSR1 for torchrun, which its ranks inherit."""
    number = getattr(signal, name)
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            stop.record_all()
            os.kill(os.getpid(), number)
            assert bool(stop.number) == is_recorded
    finally:
        signal.signal(number, previous)
