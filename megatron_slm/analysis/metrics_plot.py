"""Plots of the metrics of one or more runs, as PNG or SVG."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megatron_slm.analysis.curves import COLORS
from megatron_slm.analysis.metric_columns import Series
from megatron_slm.analysis.run_files import RunFiles
from megatron_slm.analysis.svg_chart import Line, reduce_points
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import atomic_path, check_output_file

COLUMNS = 2  # of panels
FEW = 30  # points of a line with markers
MAX_POINTS = 2000  # per line; longer lines are means with a band from the lowest to the highest value
SUFFIXES = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}  # and the metadata that names a program
PROGRAM = "megatron_slm plot"
LONGEST_NAME = 48  # characters; longer ones leave no room for the curves
LINE_STYLES = ("-", "--", ":", "-.")
UNITS = {"loss": "nats per token", "seconds": "s", "tokens_per_second": "tokens/s", "tflops": "TFLOP/s per device"}
DEFAULT_METRICS = ("loss", "eval/loss", "grad_norm", "lr", "share_selected", "threshold")


@dataclass(frozen=True)
class Metric:
    """Represent a metric by its kind of record and its name: "loss", "eval/loss" or "eval/SET/loss"."""

    kind: str
    name: str
    held_out: str | None = None  # one set; None: all sets

    @staticmethod
    def parse(text: str) -> Metric:
        """Return the metric of a name on the command line."""
        kind, slash, rest = text.partition("/")
        if not slash:
            return Metric("train", text)
        held_out, slash, name = rest.rpartition("/")
        return Metric(kind, name, held_out or None)

    @property
    def is_noisy(self) -> bool:
        """Return whether the metric is one of a batch, and not scheduled or evaluated."""
        return self.kind == "train" and self.name != "lr"

    def lines(self, run: RunFiles) -> list[tuple[str, Series]]:
        """Return the label and the values of each line of a run."""
        if self.kind == "train":
            found = [("", run.series(self.name))]
        else:
            names = [name for name in run.sets(self.kind) if self.held_out in (None, name)]
            found = [(name, run.series(self.name, self.kind, name)) for name in names]
        return [(label, series) for label, series in found if len(series)]


def check_plot(path: str, flag: str) -> None:
    """Raise ConfigError if a plot cannot be written to ``path``, or its suffix is not that of a supported format."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{flag} {path}: the format is not known by its suffix. Use {', '.join(SUFFIXES)}.")
    check_output_file(path, flag, is_ours=_is_plot)


def _is_plot(path: Path) -> bool:
    content = path.read_bytes()
    return not content or PROGRAM.encode() in content


def known_metrics(runs: Sequence[RunFiles]) -> list[str]:
    """Return the names of all metrics of the runs."""
    names = [name for run in runs for name in run.metric_names()]
    for kind in ("eval", "task"):
        names += [f"{kind}/{name}" for run in runs for name in run.metric_names(kind)]
    return list(dict.fromkeys(names))


def plot_metrics(
    runs: Sequence[RunFiles], metrics: Sequence[str], path: str, *, axis: str, smoothing: float, role: str
) -> None:
    """Plot one panel per metric, with one line per run and validation set.

    Args:
        metrics: names as in :class:`Metric`.
        axis: "steps" or "tokens".
        smoothing: weight of the previous mean in an exponential moving average, 0 for none.
        role: flag of ``path``.
    """
    import matplotlib.pyplot as plt

    rows, columns = math.ceil(len(metrics) / COLUMNS), min(COLUMNS, len(metrics))
    size = (5.5 * columns, 3.3 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, name in zip(panels.flat, metrics, strict=False):
        metric = Metric.parse(name)
        _draw_lines(panel, metric, runs, axis, smoothing if metric.is_noisy else 0.0)
        _dress(panel, name, axis)
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    metadata = {SUFFIXES[Path(path).suffix.lower()]: PROGRAM}
    with atomic_path(path, role, is_ours=_is_plot) as temporary, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(temporary, dpi=130, metadata=metadata)
    plt.close(figure)
    if any("missing from" in str(warning.message) for warning in caught):
        notice("the font of the plot lacks characters of the names; the plot has boxes in their place")


def _draw_lines(panel: Axes, metric: Metric, runs: Sequence[RunFiles], axis: str, smoothing: float) -> None:
    """Draw the lines of a metric: colors distinguish runs, or the sets of a single run, and styles the sets."""
    for number, run in enumerate(runs):
        for style, (label, series) in enumerate(metric.lines(run)):
            color = COLORS[(number if len(runs) > 1 else style) % len(COLORS)]
            x = series.tokens if axis == "tokens" else series.steps
            raw = points = reduce_points(Line(label, x, series.values), MAX_POINTS)
            if smoothing:
                points = reduce_points(Line(label, x, smooth(series.values, smoothing)), MAX_POINTS)
            if raw.is_reduced:
                panel.fill_between(raw.x, raw.low, raw.high, color=color, alpha=0.25, linewidth=0)
            elif smoothing:
                panel.plot(raw.x, raw.y, color=color, alpha=0.25, linewidth=0.8)
            panel.plot(
                points.x,
                points.y,
                color=color,
                label=_plain(" ".join(part for part in (run.name if len(runs) > 1 else "", label) if part)),
                linestyle=LINE_STYLES[(style + number // len(COLORS)) % len(LINE_STYLES)],
                linewidth=1.4,
                marker="o" if len(points.x) <= FEW else None,
                markersize=3,
            )


def _dress(panel: Axes, name: str, axis: str) -> None:
    from matplotlib.ticker import EngFormatter

    unit = "loss" if "loss" in name else name
    panel.set_title(_plain(name), fontsize=10)
    panel.set_xlabel(axis)
    panel.set_ylabel(UNITS.get(unit, ""))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if any(panel.get_legend_handles_labels()[1]):
        panel.legend(frameon=False, fontsize=8)


def _plain(text: str) -> str:
    """Return a text that matplotlib shows as it is: without formulas, and in legends also with a leading underscore.

    Control characters, which SVG cannot hold, and characters of names that are not UTF-8 become question marks; of
    long texts, the end is shown.
    """
    if len(text) > LONGEST_NAME:
        text = f"...{text[-LONGEST_NAME:]}"
    text = "".join("?" if unicodedata.category(character) == "Cc" else character for character in text)
    return (" " * text.startswith("_") + text).replace("$", r"\$").encode(errors="replace").decode()


def smooth(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Return the exponential moving average, free of the bias of its start; NaN values are left out."""
    average, norm, result = 0.0, 0.0, np.full(len(values), np.nan)
    for place, value in enumerate(values):
        if math.isfinite(value):
            average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
            result[place] = average / norm
    return result
