"""Random numbers per token, independent of the split over ranks and micro-batches."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# The multipliers of the SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# Streams of random numbers: each use has its stream, so that the numbers of one token are independent.
RANDOM_SCORE, STOCHASTIC_RANKING, TIES = range(3)


def uniform(index: Tensor, seed: int, stream: int) -> Tensor:
    """Return uniform numbers in (0, 1), hashed from the token's index in the run.

    Args:
        index: [...] int64, the same for the same token of the same run.
        seed: of the run.
        stream: the use of the numbers, such as :data:`RANDOM_SCORE`.

    Returns:
        [...] float64
    """
    bits = _mix(index * _GAMMA + _stream_start(seed, stream))
    return (_shift_right(bits, 11).double() + 0.5) * 2.0**-53


def gumbel(index: Tensor, seed: int, stream: int) -> Tensor:
    """Return standard Gumbel noise, [...] float64.

    The top k of log-weights plus this noise are a sample without replacement (Kool et al., "Stochastic Beams and Where
    to Find Them", ICML 2019).
    """
    return -torch.log(-torch.log(uniform(index, seed, stream)))


@cache
def _stream_start(seed: int, stream: int) -> int:
    """Return the start of a stream, computed on the host, so that nothing is copied to a GPU."""
    return int(_mix(torch.tensor(seed) * _GAMMA + stream))


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Return the logical right shift; torch shifts signed integers arithmetically."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)
