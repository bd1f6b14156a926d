"""Manual garbage collection: all ranks collect at the same steps, instead of when Python's thresholds are reached."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_slm.config.schema import DiagnosticsConfig


class ManualCollection:
    """Collect garbage at the steps and evaluations of --manual-gc; without it, Python collects automatically."""

    def __init__(self, settings: DiagnosticsConfig) -> None:
        self.is_on, self.interval = settings.manual_gc, settings.manual_gc_interval
        self.at_evaluations = settings.manual_gc and settings.manual_gc_eval

    @contextmanager
    def replacing_automatic(self) -> Iterator[None]:
        """Disable automatic collection during the block."""
        if not self.is_on or not gc.isenabled():
            yield
            return
        gc.disable()
        gc.collect()
        try:
            yield
        finally:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is due after ``step`` completed steps."""
        if self.is_on and self.interval and step % self.interval == 0:
            gc.collect()

    @contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Collect before and after the block."""
        if self.at_evaluations:
            gc.collect()
        yield
        if self.at_evaluations:
            gc.collect()
