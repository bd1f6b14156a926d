"""A curve for values of one kind: how the entropies of a sidecar and its losses of two bytes are quantised.

Code c of 0 ... n (255 or 65,535) stands for the value ceiling · (c ÷ n)^curve. What matters is the error in nats, for
the reference loss is subtracted from the token loss; and the losses of a good model crowd near zero, where a curve
above 1 puts its codes closer together. A value is given the nearest code, so the error is at most half the gap
between neighbours; values above the ceiling get the highest code. For losses of one byte see data/scores/codebooks.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

CURVE = 1.5
ABOVE_UNIFORM = 4.0  # nats by which the ceiling of a loss lies above ln V, the loss of a model that knows nothing
DTYPES: dict[int, Any] = {1: np.dtype(np.uint8), 2: np.dtype("<u2")}


@dataclass(frozen=True)
class ScoreCode:
    """A quantisation of values from 0 to ``ceiling``, in nats."""

    bytes: int  # of one value: 1 or 2
    ceiling: float
    curve: float = CURVE

    @staticmethod
    def for_entropy(vocab_size: int, width: int) -> ScoreCode:
        """For entropies, which are at most ln V."""
        return ScoreCode(width, math.log(vocab_size))

    table_bytes: ClassVar[int] = 0  # it needs no table in a file

    @property
    def dtype(self) -> Any:
        return DTYPES[self.bytes]

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The value of every code, ascending."""
        steps = np.linspace(0.0, 1.0, 256**self.bytes)
        return (self.ceiling * steps**self.curve).astype(np.float32)

    @cached_property
    def max_error(self) -> float:
        """The largest error of a value that does not exceed the ceiling, in nats: half the widest gap, and fp32's own
        rounding of the value and of the middle of the gap."""
        gap = float(np.diff(self.values.astype(np.float64)).max())
        return gap / 2 + float(np.spacing(np.float32(self.ceiling)))

    def encode(self, values: NDArray[np.float32], labels: Any = None) -> NDArray[np.unsignedinteger]:
        """The codes of fp32 ``values`` of any shape, whatever their ``labels``."""
        edges = (self.values[:-1] + self.values[1:]) / 2
        return np.searchsorted(edges, values).astype(self.dtype)

    def decode(self, codes: NDArray[np.unsignedinteger], labels: Any = None) -> NDArray[np.float32]:
        """The values of ``codes``, fp32, whatever their ``labels``."""
        return self.values[codes]
