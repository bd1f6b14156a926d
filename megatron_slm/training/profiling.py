"""Profiles of training steps: traces of torch's profiler, ranges for nsys, and snapshots of GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from megatron_slm.config.schema import DiagnosticsConfig, RunConfig
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.groups import Groups

DIRECTORY = "torch_profile"  # in --save
SNAPSHOT = "snapshot.pickle"
ALLOCATIONS = 100_000  # allocations and deallocations that a snapshot includes


def is_profiled(settings: DiagnosticsConfig, rank: int) -> bool:
    """Return whether --profile-ranks includes a rank."""
    return not settings.profile_ranks or rank in settings.profile_ranks


class StepProfiler:
    """Profile the steps after --profile-step-start up to --profile-step-end, on the ranks of --profile-ranks.

    A run that resumes between them profiles the remaining steps.
    """

    def __init__(self, config: RunConfig, groups: Groups, console: Console) -> None:
        self.settings, self.rank, self.console = config.diagnostics, groups.rank, console
        self.directory = Path(config.checkpoint.save or ".") / DIRECTORY
        self.is_on = self.settings.profile and is_profiled(self.settings, groups.rank)
        self.step: int | None = None  # completed steps
        self.stop: Callable[[], None] | None = None  # ends the active profile

    def before_step(self, step: int) -> None:
        """Start the profile if it is due after ``step`` completed steps."""
        settings, is_first, self.step = self.settings, self.step is None, step
        if self.is_on and is_first and step >= settings.profile_step_end:
            warn(f"no step is profiled: the run resumes after step {step}. Raise --profile-step-start and -end.")
        if self.is_on and self.stop is None and settings.profile_step_start <= step < settings.profile_step_end:
            self.stop = self._start_torch() if settings.use_pytorch_profiler else _start_nsys()

    def after_step(self, step: int) -> None:
        """End the profile if it is complete after ``step`` completed steps."""
        self.step = step
        if step >= self.settings.profile_step_end:
            self.close()

    def close(self) -> None:
        """End the active profile, if any."""
        if self.stop is not None:
            stop, self.stop = self.stop, None
            stop()

    def _start_torch(self) -> Callable[[], None]:
        settings, first = self.settings, (self.step or 0) + 1
        profiler = torch.profiler.profile(
            record_shapes=settings.pytorch_profiler_collect_shapes,
            with_stack=settings.pytorch_profiler_collect_callstack,
        )
        profiler.start()

        def stop() -> None:
            profiler.stop()
            self._write(profiler, f"rank-{self.rank}-steps-{first}-{self.step}.json.gz")

        return stop

    def _write(self, profiler: torch.profiler.profile, name: str) -> None:
        """Write a Chrome trace; a full disk does not end the run."""
        path, partial = self.directory / name, self.directory / f".partial-{name}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            warn(f"--use-pytorch-profiler: {path} cannot be written ({error}).")
        else:
            self.console.print(f"profile: {path}", markup=False)


def _start_nsys() -> Callable[[], None]:
    """Start the range that nsys captures; return a function that ends it."""
    stack = ExitStack()
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaProfilerStart())
    stack.callback(lambda: torch.cuda.check_error(runtime.cudaProfilerStop()))
    stack.enter_context(torch.autograd.profiler.emit_nvtx())
    return stack.close


def record_memory(config: RunConfig, groups: Groups) -> None:
    """Start to record memory allocations on this rank if --record-memory-history asks for it."""
    settings = config.diagnostics
    if not settings.record_memory_history or not is_profiled(settings, groups.rank):
        return
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)

    def out_of_memory(device: int, allocated: int, device_total: int, device_free: int) -> None:
        write_memory_snapshot(config, groups.rank)

    torch._C._cuda_attach_out_of_memory_observer(out_of_memory)  # type: ignore[attr-defined]


def write_memory_snapshot(config: RunConfig, rank: int) -> None:
    """Write the recorded memory allocations of this rank, if there are any."""
    settings = config.diagnostics
    if not settings.record_memory_history or not is_profiled(settings, rank):
        return
    given = Path(settings.memory_snapshot_path or Path(config.checkpoint.save or ".") / SNAPSHOT)
    path = given.with_name(f"{given.stem}_{rank}{given.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        warn(f"--record-memory-history: {path} cannot be written ({error.strerror}).")
