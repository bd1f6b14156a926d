"""Memory of this rank, for log lines and metrics."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import psutil
import torch

from megatron_slm.runtime.files import format_size


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a rank in bytes: on a GPU that of torch's allocator, on a CPU the resident set of the process."""

    current: int
    peak: int  # since the start of the process
    reserved: int | None  # by the allocator, including unused blocks; None on a CPU

    @staticmethod
    def measure(device: torch.device) -> MemoryUse:
        """Return the memory of this rank."""
        if device.type == "cuda":
            cuda = torch.cuda
            return MemoryUse(cuda.memory_allocated(), cuda.max_memory_allocated(), cuda.memory_reserved())
        current, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return MemoryUse(current, max(current, peak), None)

    def __str__(self) -> str:
        """Return the sizes for a log line."""
        reserved = "" if self.reserved is None else f", reserved {format_size(self.reserved)}"
        return f"{format_size(self.current)} (peak {format_size(self.peak)}{reserved})"
