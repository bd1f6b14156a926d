"""Batches are read while others are used, in order, and copied to a GPU beside its computation."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_slm.data.read_ahead import read_ahead

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Batch:
    """A numbered micro-batch that records the calls on it."""

    def __init__(self, number: int, calls: list[str]) -> None:
        self.number, self.calls = number, calls

    def pinned(self) -> Batch:
        self.calls.append(f"pin {self.number}")
        return self

    def to(self, device: torch.device) -> Batch:
        self.calls.append(f"copy {self.number}")
        return self

    def record_stream(self, stream: Any) -> None:
        self.calls.append(f"keep {self.number} for {stream.name}")


def test_the_next_batch_is_read_while_one_is_used() -> None:
    started = [threading.Event() for _ in range(4)]

    def read(number: int) -> list[Batch]:
        started[number].set()
        return [Batch(number, [])]

    jobs = (lambda number=number: read(number) for number in range(4))
    stream = read_ahead(jobs, CPU, ahead=1)
    assert [batch.number for batch in next(stream)] == [0]
    assert started[1].wait(60) and not started[2].is_set()
    assert [batch.number for batches in stream for batch in batches] == [1, 2, 3]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_errors_appear_in_order_and_end_the_stream(ahead: int) -> None:
    def fail() -> list[Batch]:
        raise OSError("gone")

    stream = read_ahead([lambda: [Batch(0, [])], fail, lambda: [Batch(2, [])]], CPU, ahead)
    assert [batch.number for batch in next(stream)] == [0]
    with pytest.raises(OSError, match="gone"):
        next(stream)
    assert list(stream) == []


def test_copies_to_a_gpu_have_a_stream() -> None:
    """The current stream waits for the copies on the device, and the memory is kept until it has used it."""
    calls: list[str] = []
    current = SimpleNamespace(name="current", wait_event=lambda event: calls.append(f"current waits for {event}"))
    copies = SimpleNamespace(record_event=lambda: calls.append("event") or "event")

    def entered(stream: Any) -> Any:
        assert stream is copies
        calls.append("enter")
        return nullcontext()

    with mock.patch.multiple(
        torch.cuda,
        Stream=lambda device: copies,
        stream=entered,
        device=lambda device: nullcontext(),
        current_stream=lambda device: current,
    ):
        list(read_ahead([lambda: [Batch(0, calls), Batch(1, calls)]], GPU, ahead=0))
    copied = ["enter", "pin 0", "copy 0", "pin 1", "copy 1", "event"]
    assert calls == [*copied, "current waits for event", "keep 0 for current", "keep 1 for current"]
