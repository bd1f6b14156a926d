"""Collective decision to stop a run before its last step."""

from __future__ import annotations

import os
import time

import psutil
import torch
import torch.distributed as dist

from megatron_slm.runtime.groups import Groups
from megatron_slm.runtime.signals import StopSignals, signal_name


class StopDecision:
    """Decide collectively whether to stop: after a signal, or an exceeded time limit, on any rank.

    Args:
        groups: process groups; the decision includes all ranks.
        signals: stop signals of this process, or None if they are not handled.
        minutes: --exit-duration-in-mins, counted from the start of the process.
    """

    def __init__(self, groups: Groups, signals: StopSignals | None, minutes: float | None) -> None:
        self.reason: str | None = None  # set on every rank after a decision to stop
        self._groups = groups
        self._signals = signals
        self._minutes = minutes
        self._age = process_age()
        self._created = time.monotonic()

    def agreed(self) -> bool:
        """Return True on every rank if any rank has to stop. Collective: one all-reduce of two numbers."""
        if self.reason is None and (self._signals is not None or self._minutes is not None):
            number = self._signals.number if self._signals is not None else 0
            state = torch.tensor([number, int(self._is_overdue())], device=self._groups.device)
            dist.all_reduce(state, op=dist.ReduceOp.MAX)
            number, is_overdue = state.tolist()
            if number:
                self.reason = signal_name(number)
            elif is_overdue:
                self.reason = f"--exit-duration-in-mins {self._minutes:g}"
        return self.reason is not None

    def _is_overdue(self) -> bool:
        if self._minutes is None:
            return False
        return self._age + time.monotonic() - self._created > self._minutes * 60


def process_age() -> float:
    """Return the seconds since the start of this process, including imports."""
    return max(time.time() - psutil.Process(os.getpid()).create_time(), 0.0)
