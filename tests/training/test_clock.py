"""Test that step times exclude evaluations and saves, and that the remaining time includes them."""

from __future__ import annotations

import pytest

from megatron_slm.training import clock
from megatron_slm.training.clock import Schedule, StepClock


class FakeTime:
    """Clock controlled by the test."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(clock, "time", fake)
    return fake


@pytest.mark.parametrize(
    ("step", "interval", "left"),
    [(0, None, 1), (9, None, 1), (10, None, 0), (0, 4, 3), (4, 4, 2), (8, 4, 1), (9, 4, 1), (5, 5, 1), (0, 20, 1)],
)
def test_evaluations_and_saves_left(step: int, interval: int | None, left: int) -> None:
    assert Schedule(10).left(step, interval) == left


def test_steps_do_not_contain_evaluations_and_saves(fake: FakeTime) -> None:
    steps = StepClock(Schedule(10, eval_interval=2, save_interval=5))
    with steps.evaluating():  # of step 0
        fake.now += 100
    fake.now += 7  # work before the first step
    steps.start()
    for seconds in (5, 1):
        fake.now += seconds
        steps.tick()
    assert steps.seconds_per_step() == 3
    with steps.evaluating():
        fake.now += 50
    with steps.saving():
        fake.now += 20
    fake.now += 2
    steps.tick()
    assert steps.seconds_per_step() == 2
    assert steps.seconds_left(3, 7) == 7 * 1.5 + 4 * 75 + 2 * 20  # the first step warms up and does not count


def test_larger_batches_take_longer(fake: FakeTime) -> None:
    steps = StepClock(Schedule(4))
    steps.start()
    for samples, seconds in ((4, 9), (4, 1), (8, 2)):
        fake.now += seconds
        steps.tick(samples)
    assert steps.seconds_left(3, 16) == 16 * 3 / 12
