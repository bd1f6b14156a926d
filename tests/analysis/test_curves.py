"""Held-out loss of several seeds."""

from __future__ import annotations

import numpy as np

from megatron_slm.analysis.curves import Curve, mean_and_spread


def test_spread_is_that_of_a_sample_of_seeds() -> None:
    curves = [Curve("slm", seed, "clean", [10, 20], [4.0 + seed, 3.0]) for seed in (0, 2)]
    others = [Curve("clm", 0, "clean", [10, 20], [9.0, 9.0]), Curve("slm", 0, "raw", [10, 20], [9.0, 9.0])]
    tokens, mean, spread = mean_and_spread([*curves, *others], "slm", "clean")
    assert tokens.tolist() == [10, 20] and mean.tolist() == [5, 3]
    assert np.allclose(spread, [2**0.5, 0])
    assert mean_and_spread(others, "clm", "clean")[2].tolist() == [0, 0], "one seed has no spread"
