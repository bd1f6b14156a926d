"""Token dynamics of a run (Rho-1, section 2.1 and appendix D.1): how the losses of fixed tokens move during training.

Losses are a matrix [c, n] of c checkpoints and n tokens in nats; x [c] is the training length at each checkpoint.

* A straight line is fitted to the losses of each token by least squares. ΔL is its value at the last checkpoint minus
  that at the first. H→L: ΔL < −0.2. L→H: ΔL > 0.2. Otherwise H→H if the last loss is above the mean last loss of all
  tokens, and L→L if not.
* A sigmoid in log x is fitted beside it: loss = floor + height · σ((log x₀ − log x) / width). Its midpoint x₀ is the
  learning time of a token whose loss falls. The idea is that of "Smooth Scaling Laws Hide Stepwise Token Learning"
  (arXiv 2606.29858); parameters and fitting procedure are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CLASSES = ("H→L", "L→L", "H→H", "L→H")
CHANGE = 0.2  # nats; smaller changes of a line are persistence
MIDPOINTS, WIDTHS = 24, (0.1, 0.2, 0.4, 0.8, 1.6)  # of the sigmoids that are tried; widths are shares of the range
SIGMOID_PARAMETERS, LINE_PARAMETERS = 4, 2
BLOCK = 1 << 14  # tokens fitted at a time
LEAST_VARIANCE = 1e-12  # of residuals, below which fits are equally exact


@dataclass(frozen=True)
class Lines:
    """Hold the straight lines of n tokens; each [n]."""

    first: Floats  # value at the first checkpoint
    last: Floats  # value at the last checkpoint
    residual: Floats  # sum of squares

    @property
    def change(self) -> Floats:
        """Return ΔL."""
        return self.last - self.first


def fit_lines(x: Floats, losses: Floats) -> Lines:
    """Fit a straight line to the losses of each token by least squares."""
    offsets = x - x.mean()
    mean = losses.mean(0)
    slope = offsets @ (losses - mean) / (offsets @ offsets)
    residual = np.square(losses - mean - offsets[:, None] * slope).sum(0)
    return Lines(mean + slope * offsets[0], mean + slope * offsets[-1], residual)


def classify(change: Floats, last_losses: Floats) -> NDArray[np.int64]:
    """Return the class of each token as its position in :data:`CLASSES`, [n].

    Args:
        change: ΔL of each token.
        last_losses: losses at the last checkpoint.
    """
    persistent = np.where(last_losses > last_losses.mean(), CLASSES.index("H→H"), CLASSES.index("L→L"))
    moved = np.where(change > 0, CLASSES.index("L→H"), CLASSES.index("H→L"))
    return np.where(np.abs(change) > CHANGE, moved, persistent)


@dataclass(frozen=True)
class Sigmoids:
    """Hold the sigmoids of n tokens; each [n]."""

    midpoint: Floats  # x₀
    width: Floats  # in log x
    floor: Floats
    height: Floats  # positive if the loss falls
    residual: Floats  # sum of squares


def fit_sigmoids(x: Floats, losses: Floats) -> Sigmoids:
    """Fit a sigmoid in log x to the losses of each token: the best midpoint and width of a grid, by least squares."""
    blocks = [_fit_block(np.log(x), losses[:, start : start + BLOCK]) for start in range(0, losses.shape[1], BLOCK)]
    return Sigmoids(*(np.concatenate(values) for values in zip(*blocks, strict=True)))


def _fit_block(u: Floats, losses: Floats) -> tuple[Floats, ...]:
    mean = losses.mean(0)
    centered = losses - mean
    total = np.square(centered).sum(0)
    best = np.full((5, losses.shape[1]), np.nan)
    best[4] = np.inf
    for midpoint in np.linspace(u[0], u[-1], MIDPOINTS):
        for share in WIDTHS:
            width = share * (u[-1] - u[0])
            curve = 1 / (1 + np.exp((u - midpoint) / width))
            offsets = curve - curve.mean()
            height = offsets @ centered / (offsets @ offsets)
            residual = np.maximum(total - height**2 * (offsets @ offsets), 0.0)
            better = residual < best[4]
            values = (np.exp(midpoint), width, mean - height * curve.mean(), height, residual)
            for row, value in zip(best, values, strict=True):
                row[better] = value if np.isscalar(value) else value[better]
    return tuple(best)


def akaike(residual: Floats, checkpoints: int, parameters: int) -> Floats:
    """Return Akaike's criterion of a fit of each token, corrected for few checkpoints (AICc); lower is better.

    Args:
        residual: sum of squares of each token.
        checkpoints: number of them, at least ``parameters`` + 3.
        parameters: of the curve; the variance of the residuals is one more.
    """
    count = parameters + 1
    correction = 2 * count * (count + 1) / (checkpoints - count - 1)
    return checkpoints * np.log(np.maximum(residual / checkpoints, LEAST_VARIANCE)) + 2 * count + correction


def explained(residual: Floats, losses: Floats) -> float:
    """Return the share of the variance over training, of all tokens together, that a fit explains."""
    total = np.square(losses - losses.mean(0)).sum()
    return 1 - float(residual.sum() / total) if total else 1.0


def class_losses(losses: Floats, classes: NDArray[np.int64]) -> Floats:
    """Return the mean loss of each class at each checkpoint, [c, 4]; NaN for an empty class."""
    means = [losses[:, classes == number].mean(1) if (classes == number).any() else None for number in range(4)]
    return np.stack([np.full(len(losses), np.nan) if mean is None else mean for mean in means], 1)


def select_top(scores: Floats, ratio: float) -> Bools:
    """Return the ⌈ratio · n⌉ tokens with the highest scores, [n]; equal scores are taken in order."""
    count = max(1, int(np.ceil(round(ratio * len(scores), 6))))
    selected = np.zeros(len(scores), np.bool_)
    selected[np.argsort(-scores, kind="stable")[:count]] = True
    return selected


def perplexities(losses: Floats, selections: Sequence[Bools]) -> Floats:
    """Return the perplexity at each checkpoint (column) of the tokens of each selection (row), [selections, c]."""
    with np.errstate(over="ignore"):  # of a diverged checkpoint
        return np.exp(np.stack([losses[:, selected].mean(1) for selected in selections]))


def overlaps(selections: Sequence[Bools]) -> Floats:
    """Return the share of the tokens of each selection (row) that the others (column) contain, [c, c]."""
    masks = np.stack(selections).astype(np.float64)
    return masks @ masks.T / masks.sum(1)[:, None]
