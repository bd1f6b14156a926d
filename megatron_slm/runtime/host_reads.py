"""Numbers that the host reads from a device, together where possible: each read waits for all work on the device."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor


class HostRead:
    """Numbers of a device that the host needs later. The first access to one reads all that are pending.

    Args:
        values: [...] of any dtype whose values fp64 holds exactly; all pending reads have the same device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().reshape(-1).double()
        self._numbers: list[float] | None = None
        _pending.add(self)

    def numbers(self) -> list[float]:
        """Return the values, flat."""
        if self._numbers is None:
            _read_pending()
        assert self._numbers is not None
        return self._numbers

    def __int__(self) -> int:
        (number,) = self.numbers()
        return int(number)


_pending: WeakSet[HostRead] = WeakSet()


def _read_pending() -> None:
    reads = list(_pending)
    _pending.clear()
    numbers = torch.cat([read._values for read in reads]).tolist()
    for read in reads:
        size = len(read._values)
        read._numbers, numbers = numbers[:size], numbers[size:]


def row_indices(values: Tensor, count: int) -> Tensor:
    """Return the indices of the nonzero entries of ``values`` [n], [count] int64, ascending; the host knows the count.

    Without the count, as in ``nonzero``, the host would wait for the device.
    """
    return torch.nonzero_static(values, size=count).squeeze(1)
