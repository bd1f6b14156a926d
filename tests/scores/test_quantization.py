"""Quantization: the error bound holds for every value, order is preserved, and values above the ceiling are clamped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.scores.quantization import CODES, DTYPE, Quantization

CEILINGS = st.floats(0.5, 40, width=32)
CURVES = st.sampled_from([1.0, 1.5, 2.0, 3.0])


@settings(deadline=None)
@given(CEILINGS, CURVES, st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_error_is_within_the_bound(ceiling: float, curve: float, shares: list[float]) -> None:
    code = Quantization(ceiling, curve)
    values = (np.array(shares) * ceiling).astype(np.float32)
    errors = np.abs(code.decode(code.encode(values)).astype(np.float64) - values)
    assert errors.max() <= code.max_error


@settings(max_examples=40, deadline=None)
@given(CEILINGS, CURVES)
def test_error_bound_is_tight(ceiling: float, curve: float) -> None:
    """The error in the middle of the widest gap approaches the bound."""
    code = Quantization(ceiling, curve)
    middle = ((code.values[-2] + code.values[-1]) / 2).astype(np.float32).reshape(1)
    error = abs(float(code.decode(code.encode(middle))[0]) - float(middle[0]))
    assert error >= 0.9 * code.max_error - 4 * float(np.spacing(np.float32(ceiling)))


@settings(max_examples=25, deadline=None)
@given(CEILINGS, CURVES, st.integers(0, 2**32 - 1))
def test_nearest_code_and_round_trip(ceiling: float, curve: float, seed: int) -> None:
    code = Quantization(ceiling, curve)
    codes = np.random.default_rng(seed).integers(0, CODES, 100).astype(DTYPE)
    assert np.array_equal(code.encode(code.decode(codes)), codes)
    assert codes.dtype == code.encode(code.values).dtype == np.dtype("<u2")
    values = np.random.default_rng(seed).uniform(0, ceiling, 20).astype(np.float32)
    gaps = np.abs(code.values[None].astype(np.float64) - values[:, None])
    chosen = gaps[np.arange(20), code.encode(values).astype(int)]
    assert np.all(chosen <= gaps.min(1) + 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100, width=32), min_size=2, max_size=50))
def test_order_is_kept(values: list[float]) -> None:
    code = Quantization(14.4)
    ascending = np.sort(np.array(values, np.float32))
    assert np.all(np.diff(code.encode(ascending).astype(int)) >= 0)


def test_ends() -> None:
    code = Quantization(12.3)
    assert code.decode(code.encode(np.array([0.0, code.ceiling, 1e9], np.float32))) == pytest.approx(
        [0, code.ceiling, code.ceiling]
    )
    assert Quantization.for_entropies(4096).ceiling == pytest.approx(np.log(4096))
    loss = Quantization.for_losses(32000)
    assert loss.ceiling == pytest.approx(np.log(32000) + 4) and loss.max_error < 1.7e-4
