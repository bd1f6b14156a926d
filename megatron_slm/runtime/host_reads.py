"""Numbers that the host reads from a device, together where possible: each read waits for all work on the device."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor


class HostReads:
    """Pending reads of one device, which the first access to any of their numbers completes together."""

    def __init__(self) -> None:
        self._pending: WeakSet[HostRead] = WeakSet()

    def request(self, values: Tensor) -> HostRead:
        """Return a pending read of ``values`` [...], of any dtype whose values fp64 holds exactly."""
        read = HostRead(values, self)
        self._pending.add(read)
        return read

    def complete(self) -> None:
        """Read the numbers of all pending reads; the host waits for the device once."""
        reads = list(self._pending)
        self._pending.clear()
        numbers = torch.cat([read.values for read in reads]).tolist()
        for read in reads:
            read.found, numbers = numbers[: len(read.values)], numbers[len(read.values) :]


class HostRead:
    """Numbers of a device that the host needs later; see :meth:`HostReads.request`."""

    def __init__(self, values: Tensor, reads: HostReads) -> None:
        self.values = values.detach().reshape(-1).double()
        self.found: list[float] | None = None
        self._reads = reads

    def numbers(self) -> list[float]:
        """Return the values, flat."""
        if self.found is None:
            self._reads.complete()
        assert self.found is not None
        return self.found

    def __int__(self) -> int:
        (number,) = self.numbers()
        return int(number)


def row_indices(values: Tensor, count: int) -> Tensor:
    """Return the indices of the nonzero entries of ``values`` [n], [count] int64, ascending; the host knows the count.

    Without the count, as in ``nonzero``, the host would wait for the device.
    """
    return torch.nonzero_static(values, size=count).squeeze(1)
