"""Held-out loss of several seeds."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from megatron_slm.analysis.curves import COLORS, Curve, mean_and_spread, plot_comparison


def test_spread_is_that_of_a_sample_of_seeds() -> None:
    curves = [Curve("slm", seed, "clean", [10, 20], [4.0 + seed, 3.0]) for seed in (0, 2)]
    others = [Curve("clm", 0, "clean", [10, 20], [9.0, 9.0]), Curve("slm", 0, "raw", [10, 20], [9.0, 9.0])]
    tokens, mean, spread = mean_and_spread([*curves, *others], "slm", "clean")
    assert tokens.tolist() == [10, 20] and mean.tolist() == [5, 3]
    assert np.allclose(spread, [2**0.5, 0])
    assert mean_and_spread(others, "clm", "clean")[2].tolist() == [0, 0], "one seed has no spread"


def test_every_variant_has_a_line(tmp_path: Path) -> None:
    """Also if there are more of them than colors."""
    names = [f"variant {number}" for number in range(len(COLORS) + 1)]
    with plt.rc_context({"svg.fonttype": "none"}):
        plot_comparison([Curve(name, 1, "clean", [0, 10], [5.0, 4.0]) for name in names], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in text for name in names)
