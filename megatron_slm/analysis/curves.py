"""Plots of held-out loss over tokens for the quickstart and the comparison of variants."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from megatron_slm.runtime.files import atomic_path, write_text

matplotlib.use("Agg")

# Okabe and Ito's color-blind-safe palette.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Curve:
    """Represent the held-out loss (nats per token) of one run on one set."""

    variant: str
    seed: int
    held_out: str  # name of the validation set
    tokens: list[int]
    losses: list[float]
    corpora: str = ""  # digest of the texts, where runs come from several machines


def mean_and_spread(
    curves: Sequence[Curve], variant: str, held_out: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return tokens, mean loss and standard deviation over seeds at each evaluation."""
    chosen = [curve for curve in curves if (curve.variant, curve.held_out) == (variant, held_out)]
    losses = np.array([curve.losses for curve in chosen])
    spread = losses.std(axis=0, ddof=1) if len(chosen) > 1 else np.zeros(losses.shape[1])
    return np.array(chosen[0].tokens, dtype=float), losses.mean(axis=0), spread


def final_losses(curves: Sequence[Curve], held_out: str, variant: str) -> NDArray[np.float64]:
    """Return the last loss of each run of a variant, in the order of seeds."""
    chosen = [curve for curve in curves if (curve.held_out, curve.variant) == (held_out, variant)]
    return np.array([curve.losses[-1] for curve in sorted(chosen, key=lambda curve: curve.seed)])


def plot_comparison(curves: Sequence[Curve], path: Path) -> None:
    """Plot one panel per held-out set, with one line per variant and its spread over seeds."""
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(curve.held_out for curve in curves))
    figure, panels = plt.subplots(1, len(sets), figsize=(5.5 * len(sets), 4), squeeze=False, layout="constrained")
    for panel, held_out in zip(panels[0], sets, strict=True):
        for number, variant in enumerate(dict.fromkeys(curve.variant for curve in curves)):
            color = COLORS[number % len(COLORS)]
            tokens, mean, spread = mean_and_spread(curves, variant, held_out)
            panel.plot(tokens / 1e6, mean, color=color, label=variant, marker="o", markersize=3)
            panel.fill_between(tokens / 1e6, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
        _dress(panel, f"{held_out} held-out loss")
    panels[0][0].legend(frameon=False)
    with atomic_path(path, "plot") as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def plot_trade_off(curves: Sequence[Curve], baseline: str, path: Path) -> None:
    """Plot differences of final losses to a baseline, the first held-out set over the second: one point per variant.

    Differences are those of runs with the same seed; their spread over seeds is much smaller than that of the losses.
    """
    import matplotlib.pyplot as plt

    down, across = dict.fromkeys(curve.held_out for curve in curves)
    figure, panel = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    points: dict[str, tuple[float, float]] = {}
    for index, variant in enumerate(dict.fromkeys(curve.variant for curve in curves)):
        x, y = (final_losses(curves, name, variant) - final_losses(curves, name, baseline) for name in (across, down))
        xerr, yerr = (float(values.std(ddof=1)) if len(values) > 1 else None for values in (x, y))
        color = COLORS[index % len(COLORS)]
        panel.errorbar(x.mean(), y.mean(), xerr=xerr, yerr=yerr, color=color, marker="o", capsize=2)
        points[variant] = float(x.mean()), float(y.mean())
    for variant, point in points.items():
        side = {"xytext": (-6, 5), "ha": "right"} if _is_left_of_another(point, points.values()) else {"xytext": (6, 5)}
        panel.annotate(variant, point, textcoords="offset points", fontsize=8, **side)
    _dress(panel, f"final {down} held-out loss less {baseline}'s")
    panel.set_xlabel(f"final {across} held-out loss less {baseline}'s (nats per token)")
    panel.margins(x=0.2, y=0.1)  # room for the names
    with atomic_path(path, "plot") as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _is_left_of_another(point: tuple[float, float], points: Collection[tuple[float, float]]) -> bool:
    """Return whether a name to the right of a point would be drawn over the name of another one."""
    width, height = (max(values) - min(values) for values in zip(*points, strict=True))
    return any(0 < x - point[0] < 0.15 * width and abs(y - point[1]) < 0.05 * height for x, y in points)


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write curves as JSON, one per line."""
    lines = ",\n".join(json.dumps({**asdict(c), "losses": [round(loss, 6) for loss in c.losses]}) for c in curves)
    write_text(path, f"[\n{lines}\n]\n")


def plot_stages(stages: Sequence[tuple[str, Sequence[Curve], Sequence[tuple[int, float, float]]]], path: Path) -> None:
    """Plot the quickstart's stages in sequence.

    Args:
        stages: name, held-out curves, and (tokens, loss of selected, loss of unselected) of the training steps.
        path: output path of the PNG file.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    offset = 0.0
    for name, curves, _ in stages:
        for color, curve in zip(COLORS, curves, strict=False):
            tokens = (offset + np.array(curve.tokens)) / 1e6
            label = f"{curve.held_out} held out" if offset == 0 else None
            left.plot(tokens, curve.losses, color=color, marker="o", markersize=3, label=label)
        left.axvline(offset / 1e6, color="#BBBBBB", linewidth=0.8)
        left.text(offset / 1e6, 1.01, f" {name}", transform=left.get_xaxis_transform(), fontsize=8)
        offset += curves[0].tokens[-1] if curves else 0
    _dress(left, "held-out loss")
    left.legend(frameon=False)
    name, _, steps = stages[-1]
    tokens = np.array([step[0] for step in steps]) / 1e6
    for place, label, color in ((1, "selected tokens", COLORS[1]), (2, "unselected tokens", COLORS[5])):
        right.plot(tokens, [step[place] for step in steps], color=color, label=label, linewidth=1)
    _dress(right, f"training loss, {name}")
    right.legend(frameon=False)
    with atomic_path(path, "plot") as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _dress(panel: Axes, label: str) -> None:
    panel.set_xlabel("tokens (millions)")
    panel.set_ylabel(f"{label} (nats per token)")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
