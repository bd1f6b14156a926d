"""Results of an analysis of token dynamics: JSON record, table and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.table import Table

from megatron_slm.analysis.dynamics import (
    CLASSES,
    LINE_PARAMETERS,
    MIDPOINTS,
    SIGMOID_PARAMETERS,
    Bools,
    Floats,
    Lines,
    Sigmoids,
    akaike,
    class_losses,
    classify,
    explained,
    fit_lines,
    fit_sigmoids,
    overlaps,
    perplexities,
    select_top,
)
from megatron_slm.analysis.token_categories import CATEGORIES
from megatron_slm.runtime.files import atomic_path

matplotlib.use("Agg")

KIND = "token dynamics"
COLORS = ("#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#009E73", "#56B4E9")  # Okabe and Ito's
LEAST_CATEGORY = 0.001  # share of the tokens, below which a category is not plotted
LEAST_FOR_SIGMOIDS = SIGMOID_PARAMETERS + 3  # checkpoints, of which the comparison with lines needs as many


@dataclass(frozen=True)
class Trajectories:
    """Hold the losses of n tokens at c checkpoints, and what is known about the tokens."""

    steps: list[int]
    tokens: Floats  # [c], consumed by the run
    losses: Floats  # [c, n], nats
    categories: NDArray[np.int64]  # [n], positions in CATEGORIES
    reference: Floats | None = None  # [n], losses of the reference model
    ratio: float = 0.6  # selection ratio of the selections


@dataclass(frozen=True)
class Dynamics:
    """Hold the fits, classes and selections of trajectories."""

    data: Trajectories
    lines: Lines
    classes: NDArray[np.int64]  # [n]
    sigmoids: Sigmoids | None  # None with too few checkpoints
    selections: list[Bools]  # tokens that each checkpoint would select by excess loss; empty without a reference model

    @classmethod
    def analyze(cls, data: Trajectories) -> Dynamics:
        """Fit, classify and select."""
        lines = fit_lines(data.tokens, data.losses)
        fits_sigmoids = len(data.steps) >= LEAST_FOR_SIGMOIDS and data.tokens[0] > 0
        selections = []
        if data.reference is not None:
            selections = [select_top(losses - data.reference, data.ratio) for losses in data.losses]
        return cls(
            data,
            lines,
            classify(lines.change, data.losses[-1]),
            fit_sigmoids(data.tokens, data.losses) if fits_sigmoids else None,
            selections,
        )

    @property
    def shares(self) -> Floats:
        """Return the share of the tokens in each class, [4]."""
        return np.bincount(self.classes, minlength=len(CLASSES)) / len(self.classes)

    @property
    def category_shares(self) -> Floats:
        """Return the share of each category among all tokens."""
        return _category_shares(self.data.categories)

    def record(self) -> dict[str, Any]:
        """Return the results as a JSON object; figures that do not exist are None."""
        data, by_class = self.data, class_losses(self.data.losses, self.classes)
        found: dict[str, Any] = {
            "steps": data.steps,
            "tokens": data.tokens.tolist(),
            "loss": data.losses.mean(1).tolist(),
            "classes": {
                name: {"share": float(self.shares[place]), "loss": _plain(by_class[:, place])}
                for place, name in enumerate(CLASSES)
            },
            "fits": self._fits(),
        }
        if self.selections:
            found["selection"] = {
                "ratio": data.ratio,
                "perplexity": [_plain(row) for row in perplexities(data.losses, self.selections)],
                "overlap": overlaps(self.selections).tolist(),
                "categories": self._categories(),
            }
        return found

    def _fits(self) -> dict[str, Any]:
        data, count = self.data, len(self.data.steps)
        found: dict[str, Any] = {"line": {"explained": explained(self.lines.residual, data.losses)}}
        if self.sigmoids is not None:
            line = akaike(self.lines.residual, count, LINE_PARAMETERS)
            sigmoid = akaike(self.sigmoids.residual, count, SIGMOID_PARAMETERS)
            learned = self.classes == CLASSES.index("H→L")
            times = np.quantile(self.sigmoids.midpoint[learned], (0.25, 0.5, 0.75)) if learned.any() else []
            found["sigmoid"] = {
                "explained": explained(self.sigmoids.residual, data.losses),
                "share_with_lower_aicc": float((sigmoid < line).mean()),
                "learning_tokens_quartiles": list(map(float, times)),
            }
        return found

    def _categories(self) -> dict[str, Any]:
        selected = [_category_shares(self.data.categories[mask]) for mask in self.selections]
        return {
            name: {"share": float(self.category_shares[place]), "selected": [float(each[place]) for each in selected]}
            for place, name in enumerate(CATEGORIES)
        }


def _category_shares(categories: NDArray[np.int64]) -> Floats:
    return np.bincount(categories, minlength=len(CATEGORIES)) / max(len(categories), 1)


def _plain(values: Floats) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def class_table(dynamics: Dynamics) -> Table:
    """Return a table of the classes: share, and mean loss at the first and the last checkpoint."""
    table = Table("class", box=None, header_style="bold")
    first, last = dynamics.data.steps[0], dynamics.data.steps[-1]
    for heading in ("share", f"loss at step {first:,}", f"loss at step {last:,}"):
        table.add_column(heading, justify="right")
    means = class_losses(dynamics.data.losses, dynamics.classes)[[0, -1]]
    for place, name in enumerate(CLASSES):
        losses = (f"{loss:.3f}" if math.isfinite(loss) else "-" for loss in means[:, place])  # of an empty class: none
        table.add_row(name, f"{dynamics.shares[place]:.1%}", *losses)
    return table


def category_table(dynamics: Dynamics) -> Table:
    """Return a table of the categories: share of all tokens, and of those that first and last checkpoint select."""
    table = Table("category", box=None, header_style="bold")
    steps = dynamics.data.steps
    for heading in ("all tokens", f"selected at step {steps[0]:,}", f"selected at step {steps[-1]:,}"):
        table.add_column(heading, justify="right")
    selected = [_category_shares(dynamics.data.categories[mask]) for mask in dynamics.selections]
    for place, name in enumerate(CATEGORIES):
        shares = (dynamics.category_shares[place], selected[0][place], selected[-1][place])
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    return table


def plot(dynamics: Dynamics, path: Path, role: str) -> None:
    """Write the plots to a PNG file: loss by class, learning times and, with selections, perplexity and categories."""
    import matplotlib.pyplot as plt

    panels = [_plot_classes, _plot_learning_times] if dynamics.sigmoids is not None else [_plot_classes]
    panels += [_plot_perplexities, _plot_categories] if dynamics.selections else []
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.5 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axes, draw in zip(grid.flat, panels, strict=False):
        with np.errstate(over="ignore"):  # perplexities of a diverged checkpoint
            draw(axes, dynamics)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    with atomic_path(path, role) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _plot_classes(axes: Axes, dynamics: Dynamics) -> None:
    losses = class_losses(dynamics.data.losses, dynamics.classes)
    for place, name in enumerate(CLASSES):
        label = f"{name} ({dynamics.shares[place]:.0%})"
        axes.plot(dynamics.data.tokens / 1e6, losses[:, place], color=COLORS[place], label=label, marker="o", ms=3)
    axes.plot(dynamics.data.tokens / 1e6, dynamics.data.losses.mean(1), color="#555555", label="all", ls="--")
    _label(axes, "loss (nats per token)", "loss by class")


def _plot_learning_times(axes: Axes, dynamics: Dynamics) -> None:
    assert dynamics.sigmoids is not None
    learned, tokens = dynamics.classes == CLASSES.index("H→L"), dynamics.data.tokens / 1e6
    half_step = (tokens[-1] / tokens[0]) ** (0.5 / (MIDPOINTS - 1))
    bins = np.geomspace(tokens[0] / half_step, tokens[-1] * half_step, MIDPOINTS + 1).tolist()
    axes.hist(dynamics.sigmoids.midpoint[learned] / 1e6, bins=bins, color=COLORS[0])
    axes.set_xscale("log")
    ticks = np.geomspace(tokens[0], tokens[-1], 5).tolist()
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    _label(axes, "tokens of class H→L", "learning time: midpoint of the sigmoid", legend=False)


def _plot_perplexities(axes: Axes, dynamics: Dynamics) -> None:
    steps, tokens = dynamics.data.steps, dynamics.data.tokens
    shown = sorted({0, (len(steps) - 1) // 2, len(steps) - 1})
    for color, place, row in zip(COLORS, shown, _rows(dynamics, shown), strict=False):
        axes.plot(tokens / 1e6, row, color=color, label=f"selected at step {steps[place]:,}", marker="o", ms=3)
    axes.plot(tokens / 1e6, np.exp(dynamics.data.losses.mean(1)), color="#555555", label="all", ls="--")
    _label(axes, "perplexity", "perplexity of selected tokens")


def _rows(dynamics: Dynamics, places: Sequence[int]) -> Floats:
    return perplexities(dynamics.data.losses, [dynamics.selections[place] for place in places])


def _plot_categories(axes: Axes, dynamics: Dynamics) -> None:
    selected = np.stack([_category_shares(dynamics.data.categories[mask]) for mask in dynamics.selections])
    for place, name in enumerate(CATEGORIES):
        if (share := dynamics.category_shares[place]) > LEAST_CATEGORY:
            rate = selected[:, place] * dynamics.data.ratio / share
            axes.plot(dynamics.data.tokens / 1e6, rate, color=COLORS[place], label=name, marker="o", ms=3)
    axes.axhline(dynamics.data.ratio, color="#555555", ls="--")
    _label(axes, "share selected", "selected share of each category")


def _label(axes: Axes, quantity: str, title: str, *, legend: bool = True) -> None:
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel(quantity)
    axes.set_title(title, fontsize=10)
    if legend:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=8)
