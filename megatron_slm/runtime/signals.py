"""Turns SIGTERM and SIGUSR1 into a question that all ranks answer alike: should the run stop now?"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_slm.runtime.groups import Groups


class StopSignal:
    """Remembers that this process was asked to stop (Slurm sends SIGUSR1 or SIGTERM before a time limit)."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self, groups: Groups) -> bool:
        """Whether any rank was asked to stop. Collective over all ranks."""
        flag = torch.tensor(int(self.received), device=groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
