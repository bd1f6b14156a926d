"""Progress of this process: phase, step and last sign of life, which the main thread records for the health thread.

Recording costs less than a microsecond, takes no lock and never waits for a device.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 5.0  # multiple of the longest interval between two signs of life, which is no hang
UNLIMITED = 2  # first occurrences of a phase
UNTYPICAL = 1  # first occurrences of a phase, whose intervals other phases may not take
STARTING, ENDING = "starting", "ending"


@dataclass
class Progress:
    """Record the phases of the main thread.

    A phase is limited if its signs of life must follow each other within the hang timeout. Its first occurrences are
    not: they may compile kernels or read files that are not cached. The second one shows how slow the model is.
    """

    phase: str = STARTING
    step: int = 0
    transitions: int = 0  # number of phases so far, equal on ranks at the same place
    is_limited: bool = False
    is_typical: bool = False
    ticked: float = field(default_factory=time.monotonic)
    longest: float = 0.0  # interval between two signs of life within typical phases, in seconds
    steps: int = 0  # training steps with work times
    seconds_loading: float = 0.0  # of all steps
    seconds_forward: float = 0.0
    pending_forwards: deque[tuple[Any, Any]] = field(default_factory=deque)  # CUDA events around each, perhaps not over
    _occurrences: Counter[str] = field(default_factory=Counter)

    def enter(self, phase: str, step: int | None = None, *, slow: bool = False) -> None:
        """Begin a phase.

        Args:
            step: the training step; None if it does not change.
            slow: whether the phase may be long without signs of life, such as a save.
        """
        self.tick()
        self.is_limited = not slow and self._occurrences[phase] >= UNLIMITED
        self.is_typical = not slow and self._occurrences[phase] >= UNTYPICAL
        self._occurrences[phase] += 1
        self.step = self.step if step is None else step
        self.phase = phase
        self.transitions += 1

    def tick(self) -> None:
        """Record a sign of life within a phase."""
        now = time.monotonic()
        if self.is_typical and now - self.ticked > self.longest:
            self.longest = now - self.ticked
        self.ticked = now

    def forgive(self, seconds: float) -> None:
        """Do not count ``seconds`` in which the process was suspended."""
        self.ticked += seconds

    def limit(self, timeout: float) -> float | None:
        """Return the longest time without a sign of life in this phase; None if it is not limited."""
        return max(timeout, PATIENCE * self.longest) if self.is_limited else None


progress = Progress()


def reset_progress() -> None:
    """Begin with the start of a run, of which a process may have several."""
    progress.__init__()  # type: ignore[misc]
