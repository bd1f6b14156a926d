"""Test that work times on a GPU are read when the device has finished, without a wait of the host."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_slm.runtime.health import work_time
from megatron_slm.runtime.health.progress import Progress, reset_progress


class Event:
    """Event that the device has reached if ``finished``."""

    finished = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def query(self) -> bool:
        return Event.finished

    def elapsed_time(self, later: Event) -> float:
        assert Event.finished, "the host would wait"
        return 250.0  # milliseconds


def test_times_of_the_device_are_read_later() -> None:
    progress = Progress()
    with mock.patch.object(torch.cuda, "Event", Event), mock.patch.object(work_time, "progress", progress):
        for _ in range(2):
            with work_time.forward_time(torch.device("cuda")):
                pass
        work_time.count_step(0.1)
        assert (progress.steps, progress.seconds_forward) == (1, 0.0)
        Event.finished = True
        work_time.count_step(0.2)
    assert (progress.steps, progress.seconds_forward) == (2, 0.5)
    assert progress.seconds_loading == pytest.approx(0.3)


def test_passes_of_an_earlier_run_are_not_counted() -> None:
    with mock.patch.object(torch.cuda, "Event", Event), work_time.forward_time(torch.device("cuda")):
        pass
    reset_progress()
    with mock.patch.object(Event, "finished", True):
        work_time.count_step(0.0)
    assert (work_time.progress.steps, work_time.progress.seconds_forward) == (1, 0.0)
    reset_progress()


def test_times_of_the_cpu_are_those_of_the_host() -> None:
    progress = Progress()
    with mock.patch.object(work_time, "progress", progress), work_time.forward_time(torch.device("cpu")):
        pass
    assert progress.seconds_forward > 0
