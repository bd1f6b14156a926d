"""Start times of processes, which identify them together with their numbers, since these are reused."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def start_time(pid: int) -> float:
    """Return the seconds from the start of the system to that of a process, which no change of the clock affects.

    Raises:
        psutil.Error: the process does not exist.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):  # not Linux, or ended
        return psutil.Process(pid).create_time()
