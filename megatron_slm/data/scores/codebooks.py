"""One byte for a loss, by codebooks: every token id spends its 256 codes where its own reference losses lie.

The end of a common word is nearly always easy and the first word of a document never is, so 256 codes for one id's
losses stand much closer together, where they are needed, than 256 for the losses of all. The range from 0 to the
ceiling is cut into equal bins. A codebook tells how many of the id's codes each bin has, and within a bin they are as
far apart as they can be; no bin has fewer than ``least``, so that the error is bounded wherever a loss may lie.

Codebooks are fitted to a sample of the corpus. For the mean absolute error, and with it for the tokens that change
sides at a threshold, the best density of codes goes with the square root of the density of the values (high-resolution
theory: the power 1 / (1 + r) for the mean of the error to the r; Gray and Neuhoff, "Quantization", 1998).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.scores.code import ABOVE_UNIFORM, ScoreCode

CODES = 256
PRIOR = 4.0  # losses of one id that weigh as much as the pooled losses of all ids that are as frequent


@dataclass(frozen=True)
class TokenCode:
    """The shape of codebooks for losses from 0 to ``ceiling``, in nats."""

    ceiling: float
    vocab_size: int
    bins: int = 32
    least: int = 2  # codes of every bin
    bytes: int = 1  # of one value

    @property
    def dtype(self) -> Any:
        return np.dtype(np.uint8)

    @property
    def table_bytes(self) -> int:
        """What the codebooks take in a file: one byte for every id and bin."""
        return self.vocab_size * self.bins

    @property
    def max_error(self) -> float:
        """The largest error of a value that does not exceed the ceiling, in nats: half the width of a code in a bin
        with the fewest, and fp32's own rounding."""
        return self.ceiling / (2 * self.bins * self.least) + float(np.spacing(np.float32(self.ceiling)))

    def count(self, counts: NDArray[np.int32], values: NDArray[np.float32], labels: NDArray[Any]) -> None:
        """Add losses [n] fp32 of the ids ``labels`` [n] to ``counts`` [vocabulary, bins]."""
        np.add.at(counts, (labels, self.bin_and_rest(values)[0]), 1)

    def bin_and_rest(self, values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The bin of every value, and where in it the value lies, from 0 to 1; above the ceiling is at its end."""
        scaled = np.clip(values.astype(np.float64) / self.ceiling, 0, 1) * self.bins
        bins = np.minimum(scaled.astype(np.int64), self.bins - 1)
        return bins, scaled - bins


def loss_code(vocab_size: int, width: int) -> TokenCode | ScoreCode:
    """How token losses of a model with that vocabulary are quantised: codebooks for one byte, a curve for two."""
    ceiling = math.log(vocab_size) + ABOVE_UNIFORM
    return TokenCode(ceiling, vocab_size) if width == 1 else ScoreCode(width, ceiling)


class Codebooks:
    """The codebooks of all token ids.

    Code c of an id lies in the bin b with starts[b] <= c < starts[b + 1], and stands for the middle of its share of it.

    Args:
        code: their shape.
        starts: [vocabulary, bins] uint8, the first code of every bin.

    Raises:
        ValueError: ``starts`` are no codebooks of that shape.
    """

    def __init__(self, code: TokenCode, starts: NDArray[np.uint8]) -> None:
        shape = (code.vocab_size, code.bins)
        if starts.shape != shape or starts[:, 0].any():
            raise ValueError(f"has damaged codebooks: {starts.shape} for {shape}, or a first code that is not 0")
        self.code = code
        self._starts = np.append(starts, np.uint8(0))  # of the next id, and 0 is 256 in uint8: so every bin has an end
        if np.diff(starts.astype(np.int16), append=np.int16(CODES)).min() < code.least:
            raise ValueError(f"has damaged codebooks: a bin with fewer than {code.least} codes")

    @property
    def starts(self) -> NDArray[np.uint8]:
        return self._starts[:-1].reshape(self.code.vocab_size, self.code.bins)

    def encode(self, values: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.uint8]:
        """The codes of the fp32 losses of the ids ``labels``, both of any one shape; nearest within the bin."""
        bins, rest = self.code.bin_and_rest(values)
        first, count = self._codes_of(bins, labels)
        return first + np.minimum(rest * count, count - 1).astype(np.uint8)

    def decode(self, codes: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.float32]:
        """The fp32 losses that ``codes`` of the ids ``labels`` stand for. Needs 2 · bins bytes more per label."""
        bins = (self.starts[labels] <= codes[..., None]).sum(-1, dtype=np.int64) - 1
        first, count = self._codes_of(bins, labels)
        width = self.code.ceiling / self.code.bins
        return ((bins + ((codes - first) + 0.5) / count) * width).astype(np.float32)

    def _codes_of(self, bins: NDArray[np.int64], labels: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """First code and number of codes of a bin of each label."""
        places = labels.astype(np.int64) * self.code.bins + bins
        first = self._starts[places]
        return first, self._starts[places + 1] - first

    @staticmethod
    def read(path: Path, offset: int, code: TokenCode) -> Codebooks:
        """Those that lie at ``offset`` of a file.

        Raises:
            ValueError: they are damaged.
        """
        starts = np.fromfile(path, np.uint8, code.table_bytes, offset=offset)
        return Codebooks(code, starts.reshape(-1, code.bins))


def fit(code: TokenCode, counts: NDArray[np.int32]) -> Codebooks:
    """The codebooks for losses of which ``counts`` [vocabulary, bins] is the histogram.

    An id's own histogram is mixed with that of all ids which occur about as often (from 2^k to 2^(k+1) − 1 times), so
    that a rare id gets what rare ids need; one that never occurs gets what those need that occur once.
    """
    totals = counts.sum(1, dtype=np.int64)
    density = counts + PRIOR * _pooled(counts, totals)
    padded = np.pad(density, ((0, 0), (1, 1)), mode="edge")
    smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    share = np.cumsum(np.sqrt(smooth), axis=1)
    before = np.pad(share[:, :-1] / share[:, -1:], ((0, 0), (1, 0)))
    free = CODES - code.bins * code.least
    starts = np.floor(free * before + 0.5).astype(np.int64) + code.least * np.arange(code.bins)
    return Codebooks(code, starts.astype(np.uint8))


def _pooled(counts: NDArray[np.int32], totals: NDArray[np.int64]) -> NDArray[np.float64]:
    """[vocabulary, bins]: for every id the distribution over all ids that are as frequent, never 0."""
    classes = np.maximum(np.frexp(totals.astype(np.float64))[1] - 1, 0)
    overall = counts.sum(0, dtype=np.int64) + 1.0
    pooled = np.tile(overall / overall.sum(), (int(classes.max()) + 1, 1))
    for number in range(len(pooled)):
        pooled[number] += counts[classes == number].sum(0, dtype=np.int64)
    return (pooled / pooled.sum(1, keepdims=True))[classes]
