"""Error reports: one message per failure of a run, independent of the number of affected ranks.

Most errors occur on every rank, and when a rank exits, the collectives of the others fail. The first rank to report
claims the failure in a store shared by all ranks; the others stay silent unless they have a different message. The
module imports no torch, since most mistakes are detected before torch is imported.
"""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from megatron_slm.runtime import early_reports
from megatron_slm.runtime.errors import LOST_PEER, ConfigError, DivergedError, explain
from megatron_slm.runtime.health import session
from megatron_slm.runtime.launch import guess_launch, launched_rank
from megatron_slm.runtime.output import prepare_output, print_error

SECONDS_FOR_RANK_0 = 2.0  # head start of rank 0 in reporting
SECONDS_FOR_OTHERS = 1.0  # for the other ranks to query the report of rank 0 afterwards
INTERRUPTED = 130  # exit code after Ctrl+C, by shell convention

_store: Store | None = None


class Store(Protocol):
    """Interface of torch's key-value stores used by reports."""

    def add(self, key: str, amount: int) -> int: ...


def share_reports(store: Store | None) -> None:
    """Coordinate reports through a store shared by all ranks; None disables this."""
    global _store
    _store = store


def run_command(action: Callable[[], None]) -> int:
    """Run a command, report its error, if any, once over all ranks, and return the exit code of the process.

    ConfigError, DivergedError, file errors and lack of memory become messages, any other error a traceback. The process
    groups are destroyed after the report, because this makes the other ranks fail.
    """
    prepare_output()
    code = 1
    try:
        code = _run_and_report(action)
    finally:
        session.announce_end(code)
        process = sys.modules.get("megatron_slm.runtime.process")
        if process is not None:  # imported, unless the error precedes the import of torch
            process.stop()
        session.stop_health()
    return code


def _run_and_report(action: Callable[[], None]) -> int:
    try:
        with session.verdict_first():
            action()
    except (ConfigError, DivergedError) as error:
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        if launched_rank() == 0:
            print_error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if (explained := explain(error)) is not None:
            explained.__cause__ = error
            report_error(explained)
            return explained.exit_code
        _report_failure(error)
        return 1
    return 0


def run_tool(action: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command of one process, which may be one of many independent tasks of a job; return its exit code.

    ConfigError, file errors and lack of memory become messages; any other error is raised.

    Args:
        action: the command.
        interrupted: printed after Ctrl+C.
    """
    prepare_output()
    try:
        action()
    except KeyboardInterrupt:
        print_error(interrupted)
        return INTERRUPTED
    except Exception as error:
        problem = error if isinstance(error, ConfigError) else explain(error)
        if problem is None:
            raise
        print_error(f"error: {problem}")
        return problem.exit_code
    return 0


def report_error(error: Exception) -> None:
    """Print the error message of rank 0, and those of other ranks if they differ, once over all ranks."""
    launch, message = guess_launch(), str(error)
    if launch.rank == 0:
        print_error(f"error: {message}")
        if _store is None:
            early_reports.announce(launch, message)
        else:
            _claim_message(message)
            time.sleep(SECONDS_FOR_RANK_0 + SECONDS_FOR_OTHERS)  # the store may disappear with this process
        return
    if _store is None:
        is_first = not early_reports.is_reported(launch, message)
    else:
        time.sleep(SECONDS_FOR_RANK_0)
        is_first = _claim_message(message)
    if is_first:
        print_error(f"error on rank {launch.rank}: {message}")
    else:
        early_reports.leave_quietly(launch)


def _claim_message(message: str) -> bool:
    """Return whether this rank is the first to report this message."""
    _claim("failure")
    return _claim(hashlib.sha256(message.encode()).hexdigest())


def _claim(key: str) -> bool:
    """Return whether this rank is the first to claim ``key``; True if the store is no longer reachable."""
    if _store is None:
        return True
    try:
        return _store.add(key, 1) == 1
    except RuntimeError:
        return True


def _report_failure(error: Exception) -> None:
    """Print an unexpected error, unless another rank has reported one, which is then the cause of this error."""
    rank = launched_rank()
    if not _claim("failure"):
        early_reports.leave_quietly(guess_launch())
        return
    prefix = f"error on rank {rank}" if rank else "error"
    if any(phrase in str(error) for phrase in LOST_PEER):
        reason = str(error).strip().splitlines()[0]
        print_error(f"{prefix}: another rank exited without a report, for example because it was killed ({reason})")
    else:
        print_error(f"{traceback.format_exc()}{prefix}: see the traceback above")
