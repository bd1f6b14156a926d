"""torchrun with a short report of failures: ``python -m megatron_slm.torchrun`` takes the arguments of torchrun.

torchrun prints a traceback and a table after the message of the rank that failed, and exits with code 1. Here a rank
that was killed is one line, a rank that has printed its message adds none, and the exit code is that of the rank.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_slm.runtime.reporting import print_error

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SIGNALLED = 128  # plus the signal's number: exit code of a process that a signal has ended, as a shell gives it


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks, wait for their end, and return the exit code of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

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
    print_error(f"error: rank {rank} (process {failure.pid}) was ended by {failure.signal_name()}")
    return SIGNALLED - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
