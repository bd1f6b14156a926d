"""End a process whose main thread may be blocked."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

import psutil

from megatron_slm.runtime.health.ranks import Identity
from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.start_times import start_time

EXIT_CODE = 4  # of all ranks, after one was dead or hung
SECONDS_TO_REPORT = 2.0  # for an output that may be blocked

logger = logging.getLogger("megatron_slm.health")


def end_process(code: int, message: str | None, *, prints: bool) -> NoReturn:
    """Exit immediately, after a report in the log of this rank and, if ``prints``, on standard error."""
    reporter = threading.Thread(target=_report, args=(message, prints), daemon=True)
    reporter.start()
    reporter.join(SECONDS_TO_REPORT)
    os._exit(code)


def _report(message: str | None, prints: bool) -> None:
    if message is not None and prints:
        print_error(f"error: {message}")
    if message is not None and logger.hasHandlers():  # otherwise, logging would print it
        logger.error("%s", message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def kill_on_this_host(identity: Identity, host: str) -> None:
    """Kill a process that may be stopped, for which Slurm would wait, if it runs on this host."""
    if identity.host != host or identity.pid == os.getpid():
        return
    with contextlib.suppress(psutil.Error, OSError):
        if start_time(identity.pid) == identity.started:
            os.kill(identity.pid, signal.SIGKILL)
