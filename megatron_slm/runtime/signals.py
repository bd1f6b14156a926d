"""Stop signals: recorded on arrival, so that a run can finish its step, save and exit.

torchrun forwards SIGTERM, SIGINT, SIGHUP and SIGQUIT to its ranks and kills them after 30 s
(``TORCH_ELASTIC_SHUTDOWN_TIMEOUT``). SIGUSR1 terminates torchrun unless it is ignored (``trap '' USR1``) or handled
(``--signals-to-handle``); see docs/slurm.md for a batch script.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

# From a batch system; handled even if the parent ignores them, as with a trap in a script.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STAYING_IGNORED = (signal.SIGINT, signal.SIGHUP)  # not handled if ignored, as with nohup and in background jobs
SECONDS_BETWEEN_INTERRUPTS = 1.0  # a second Ctrl+C after this interval aborts
PR_SET_PDEATHSIG = 1  # of prctl(2)


Handler = Callable[[int, FrameType | None], None] | signal.Handlers


class StopSignals:
    """Context manager that records the first stop signal instead of terminating the process.

    SIGTERM, SIGINT and SIGHUP terminate the process until :meth:`record_all` is called: before that, there is nothing
    to save, and a process that waits for other ranks inside a library could not react to a recorded signal. A second
    SIGINT raises KeyboardInterrupt. If torchrun dies, its ranks receive SIGTERM.

    Args:
        announces: whether to write a line to standard error when a signal arrives.
    """

    def __init__(self, announces: bool = False) -> None:
        self.number = 0  # number of the first signal; 0 before any
        self._announces = announces
        self._arrived = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in WARNINGS:
            self._handle(number, self._record)
        for number in ENDINGS:
            if not _stays_ignored(number):
                self._handle(number, signal.SIG_DFL)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _signal_at_death_of_parent(signal.SIGTERM)
        return self

    def record_all(self) -> None:
        """Record SIGTERM, SIGINT and SIGHUP from now on, too."""
        for number in ENDINGS:
            if not _stays_ignored(number):
                self._handle(number, self._record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: signal.Signals, handler: Handler) -> None:
        previous = signal.signal(number, handler)
        self._previous.setdefault(number, previous)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._arrived > SECONDS_BETWEEN_INTERRUPTS:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._arrived = number, now
            if self._announces:
                again = "; a second Ctrl+C aborts" if number == signal.SIGINT else ""
                line = f"{signal_name(number)} received: stopping after the step in progress{again}\n"
                with contextlib.suppress(OSError):  # a terminal that is gone, which SIGHUP announces
                    os.write(2, line.encode())  # print is not safe in a signal handler


def _stays_ignored(number: signal.Signals) -> bool:
    return number in STAYING_IGNORED and signal.getsignal(number) is signal.SIG_IGN


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGTERM."""
    return signal.Signals(number).name


def end_with_parent() -> None:
    """Kill this child process when its parent dies; without this, it would go on writing files beside a new run."""
    _signal_at_death_of_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # died before the request
        os._exit(1)


def _signal_at_death_of_parent(number: signal.Signals) -> None:
    """Request a signal on the death of the parent process, without which orphaned ranks would keep training."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
