"""Error reports: one message for a failure of a run, however many ranks it reaches.

Most errors reach every rank alike, and a rank that ends takes the others with it: their collectives fail. The first
rank that reports claims the failure in a store that all ranks share, and the others stay silent, unless they have
another message for the user. The module imports no torch, since most mistakes are found before torch is loaded.
"""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from megatron_slm.runtime import early_reports
from megatron_slm.runtime.errors import ConfigError, DivergedError, explain
from megatron_slm.runtime.launch import guess_launch, launched_rank
from megatron_slm.runtime.output import prepare_output

SECONDS_FOR_RANK_0 = 2.0  # to report an error before the other ranks do
SECONDS_FOR_OTHERS = 1.0  # to ask, after that, whether rank 0 has reported
INTERRUPTED = 130  # exit code after Ctrl+C, as a shell gives it

# Messages of collectives if the process at the other end is gone.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")

_store: Store | None = None


class Store(Protocol):
    """The part of torch's key-value stores that reports need."""

    def add(self, key: str, amount: int) -> int: ...


def share_reports(store: Store | None) -> None:
    """Report through a store of all ranks from here on; None ends that."""
    global _store
    _store = store


def run_command(action: Callable[[], None]) -> int:
    """Run a command and return the exit code of the process; report an error, if there is one, once over all ranks.

    ConfigError, DivergedError and errors of the machine become messages, any other error a traceback. The process
    groups are left after the report, because the other ranks fail as soon as one leaves.
    """
    prepare_output()
    try:
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
    finally:
        process = sys.modules.get("megatron_slm.runtime.process")  # not imported for a mistake found before torch is
        if process is not None:
            process.stop()
    return 0


def report_error(error: Exception) -> None:
    """Print an error message once over all ranks: rank 0's, and those of other ranks that differ from it."""
    launch, message = guess_launch(), str(error)
    if launch.rank == 0:
        print_error(f"error: {message}")
        if _store is None:
            early_reports.announce(launch, message)
        else:
            _claim_message(message)
            time.sleep(SECONDS_FOR_RANK_0 + SECONDS_FOR_OTHERS)  # the store may end with this process
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
    """Return whether this rank is the first with this message."""
    _claim("failure")
    return _claim(hashlib.sha256(message.encode()).hexdigest())


def _claim(key: str) -> bool:
    """Return whether this rank is the first to claim ``key``; True if the store is gone with its host."""
    if _store is None:
        return True
    try:
        return _store.add(key, 1) == 1
    except RuntimeError:
        return True


def _report_failure(error: Exception) -> None:
    """Print an unexpected error, unless another rank has reported one: it ended, and this rank failed with it."""
    rank = launched_rank()
    if not _claim("failure"):
        early_reports.leave_quietly(guess_launch())
        return
    where = f"error on rank {rank}" if rank else "error"
    if any(phrase in str(error) for phrase in LOST_PEER):
        reason = str(error).strip().splitlines()[0]
        print_error(f"{where}: another rank ended without a report, for example because it was killed ({reason})")
    else:
        print_error(f"{traceback.format_exc()}{where}: see the traceback above")


def print_error(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)
