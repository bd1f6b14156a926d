"""torchrun with concise failure reports: ``python -m megatron_slm.torchrun`` accepts the arguments of torchrun.

torchrun prints a traceback and a table after the message of a failed rank, and exits with code 1. This launcher prints
one line for a killed rank and nothing for a rank with an error message, and exits with the code of that rank. It
ignores SIGUSR1 and SIGUSR2, which Slurm sends to it and to the ranks, and waits for the ranks to save.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.signals import WARNINGS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SIGNALLED = 128  # plus the signal number: exit code of a process terminated by a signal, by shell convention


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, wait for them, and return the exit code of the first failed rank."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.ERROR)  # in this process, not in the ranks
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return SIGNALLED + error.sigval.value
    return 0


def _report(error: ChildFailedError) -> int:
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    print_error(f"error: rank {rank} (process {failure.pid}) was terminated by {failure.signal_name()}")
    return SIGNALLED - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
