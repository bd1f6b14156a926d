"""Test the running estimate that defines a spike of the loss or the gradient norm."""

from __future__ import annotations

import random

import pytest

from megatron_slm.training.spikes import GRADIENT, LOSS, SpikeDetector


def feed(detector: SpikeDetector, *losses: float) -> list[int]:
    """Return the places of the spikes among losses."""
    steps = [detector.observe({LOSS: loss, GRADIENT: 1.0}) for loss in losses]
    assert all(spike.metric == LOSS for spikes in steps for spike in spikes)
    return [place for place, spikes in enumerate(steps) if spikes]


def noise(count: int, mean: float = 3.0) -> list[float]:
    rng = random.Random(1)
    return [rng.gauss(mean, 0.1) for _ in range(count)]


def test_spikes_are_found_once_half_of_the_window_is_filled() -> None:
    assert feed(SpikeDetector(16, 6.0), 3.0, 9.0, *noise(5), 4.0) == []
    assert feed(SpikeDetector(16, 6.0), *noise(8), 4.0, *noise(4), 4.0) == [8]  # the second is within the deviation
    assert feed(SpikeDetector(16, 6.0), *noise(8), 4.0, *noise(16), 4.0) == [8, 25]


def test_noise_descent_and_a_lasting_rise_are_no_continuing_spikes() -> None:
    assert feed(SpikeDetector(128, 6.0), *noise(2000)) == []
    assert feed(SpikeDetector(16, 6.0), *(10 / (1 + step) for step in range(50))) == []
    assert len(feed(SpikeDetector(16, 6.0), *noise(16), *noise(50, mean=6.0))) < 3


@pytest.mark.parametrize(("rise", "spikes"), [(1e-6, []), (5e-3, []), (1e-2, [10])])
def test_constant_losses_have_a_smallest_deviation(rise: float, spikes: list[int]) -> None:
    assert feed(SpikeDetector(16, 6.0), *[3.0] * 10, 3.0 * (1 + rise)) == spikes


def test_each_metric_has_an_estimate_and_can_be_switched_off() -> None:
    detector, loss_only = SpikeDetector(8, 6.0), SpikeDetector(8, 6.0, (LOSS,))
    for value in noise(8):
        assert not detector.observe({LOSS: value, GRADIENT: 100 * value})
        assert not loss_only.observe({LOSS: value, GRADIENT: 100 * value})
    (spike,) = detector.observe({LOSS: 3.0, GRADIENT: 400.0})
    assert (spike.metric, spike.value, spike.steps) == (GRADIENT, 400.0, 8)
    assert spike.limit == pytest.approx(spike.mean + 6 * spike.deviation) and "400" in str(spike)
    assert not loss_only.observe({LOSS: 3.0, GRADIENT: 400.0})


def test_a_restored_estimate_continues() -> None:
    whole, before, after = (SpikeDetector(16, 6.0) for _ in range(3))
    feed(whole, *noise(12))
    feed(before, *noise(12)[:7])
    after.load_state_dict(before.state_dict())
    assert feed(after, *noise(12)[7:]) == []
    assert after.state_dict() == whole.state_dict()
    smaller = SpikeDetector(4, 6.0)
    smaller.load_state_dict(whole.state_dict())
    assert smaller.state_dict()[LOSS] == noise(12)[-4:]
