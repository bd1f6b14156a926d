"""Relations of profiling and garbage collection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_slm.config.schema import DiagnosticsConfig, RunConfig

PROFILER = ("pytorch_profiler_collect_shapes", "pytorch_profiler_collect_callstack")


def profile(config: RunConfig, world_size: int) -> Iterator[str]:
    """Require an interval and ranks of the run, and no settings of a profiler that is off."""
    settings = config.diagnostics
    if not settings.profile:
        yield from _idle(settings, ("profile_step_start", "profile_step_end", "use_pytorch_profiler"), "--profile")
    elif settings.profile_step_end <= settings.profile_step_start:
        yield (
            f"--profile-step-end {settings.profile_step_end} must be above --profile-step-start "
            f"{settings.profile_step_start}."
        )
    elif settings.profile_step_start >= config.training.train_iters:
        yield (
            f"--profile-step-start {settings.profile_step_start} is not below --train-iters "
            f"{config.training.train_iters}: no step would be profiled. Lower it."
        )
    if not settings.use_pytorch_profiler:
        yield from _idle(settings, PROFILER, "--use-pytorch-profiler")
    if not settings.record_memory_history:
        yield from _idle(settings, ("memory_snapshot_path",), "--record-memory-history")
    if not (settings.profile or settings.record_memory_history):
        yield from _idle(settings, ("profile_ranks",), "--profile or --record-memory-history")
    wrong = [rank for rank in settings.profile_ranks if not 0 <= rank < world_size]
    if wrong:
        yield f"--profile-ranks {' '.join(map(str, wrong))}: the run has the ranks 0 to {world_size - 1}."


def garbage_collection(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse settings of manual garbage collection without it."""
    if not config.diagnostics.manual_gc:
        yield from _idle(config.diagnostics, ("manual_gc_interval", "manual_gc_eval"), "--manual-gc")


def _idle(settings: DiagnosticsConfig, names: Sequence[str], needed: str) -> Iterator[str]:
    """Yield a message for settings that have no effect without the flag ``needed``."""
    default = DiagnosticsConfig()
    given = [name for name in names if getattr(settings, name) != getattr(default, name)]
    if given:
        flags = " ".join(
            ("--no-" if getattr(default, name) is True else "--") + name.replace("_", "-") for name in given
        )
        yield f"{flags} has no effect without {needed}. Add it, or leave {flags} out."


RELATIONS = (profile, garbage_collection)
