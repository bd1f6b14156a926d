"""Stop signals: remembered when they arrive, so that a run can finish its step, save and exit.

torchrun forwards SIGTERM, SIGINT, SIGHUP and SIGQUIT to its ranks and kills them 30 s later
(``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``). It dies of SIGUSR1 unless that is ignored (``trap '' USR1``) or handled
(``--signals-to-handle``); docs/slurm.md has the lines of a batch script.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of a batch system; also if ignored by the parent: a trap in a script
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FOR_GOOD = (signal.SIGINT, signal.SIGHUP)  # if ignored, as by nohup and in background jobs
SECONDS_BETWEEN_INTERRUPTS = 1.0  # a second Ctrl+C after this long aborts
PR_SET_PDEATHSIG = 1  # of prctl(2)


Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class StopSignals:
    """Context manager that remembers the first stop signal instead of ending the process.

    SIGTERM, SIGINT and SIGHUP end the process until :meth:`remember_all` is called: before, there is nothing to save,
    and a process that waits for other ranks in a library could not react to a signal that is remembered. A second
    SIGINT raises KeyboardInterrupt. If torchrun dies, the ranks that it started get a SIGTERM.

    Args:
        announces: write a line to standard error when a signal arrives.
    """

    def __init__(self, announces: bool = False) -> None:
        self.number = 0  # of the first signal; 0 if there was none
        self._announces = announces
        self._arrived = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in WARNINGS:
            self._handle(number, self._remember)
        for number in ENDINGS:
            if not _is_ignored_for_good(number):
                self._handle(number, signal.SIG_DFL)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _signal_at_death_of_parent(signal.SIGTERM)
        return self

    def remember_all(self) -> None:
        """Remember SIGTERM, SIGINT and SIGHUP too from here on."""
        for number in ENDINGS:
            if not _is_ignored_for_good(number):
                self._handle(number, self._remember)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: signal.Signals, handler: Handler) -> None:
        previous = signal.signal(number, handler)
        self._previous.setdefault(number, previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._arrived > SECONDS_BETWEEN_INTERRUPTS:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._arrived = number, now
            if self._announces:
                again = "; a second Ctrl+C aborts" if number == signal.SIGINT else ""
                line = f"{signal_name(number)} received: stopping after the step in progress{again}\n"
                os.write(2, line.encode())  # print is not safe in a signal handler


def _is_ignored_for_good(number: signal.Signals) -> bool:
    return number in FOR_GOOD and signal.getsignal(number) is signal.SIG_IGN


def signal_name(number: int) -> str:
    """Return the name of a signal: SIGTERM."""
    return signal.Signals(number).name


def _signal_at_death_of_parent(number: signal.Signals) -> None:
    """Ask Linux for a signal when the parent process dies; orphaned ranks would train on unnoticed otherwise."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
