"""Settings of profiling, recording of collectives, and garbage collection."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.constraints import flag


@dataclass(frozen=True, kw_only=True)
class DiagnosticsConfig:
    """Profiling and diagnostics"""

    profile: bool = flag(
        False,
        "profile iterations with torch's profiler if --use-pytorch-profiler is given, otherwise with nsys profile "
        "--capture-range=cudaProfilerApi",
    )
    profile_step_start: int = flag(10, "number of completed iterations at which profiling starts", at_least=0)
    profile_step_end: int = flag(12, "number of completed iterations at which profiling stops", above=0)
    profile_ranks: list[int] = flag(list, "ranks to profile; default all")
    use_pytorch_profiler: bool = flag(
        False, "profile with torch's profiler: a Chrome trace per rank in torch_profile in --save"
    )
    pytorch_profiler_collect_shapes: bool = flag(False, "record the shapes of tensors in torch's profiler")
    pytorch_profiler_collect_callstack: bool = flag(False, "record call stacks in torch's profiler")
    record_memory_history: bool = flag(
        False, "record GPU memory allocations; each log line and an out-of-memory error write a snapshot per rank"
    )
    memory_snapshot_path: str | None = flag(
        None, "path of memory snapshots, to which _RANK is added; default snapshot.pickle in --save"
    )
    flight_recorder_dump_path: str | None = flag(
        None, "path prefix of the recorded NCCL collectives of each rank; default flight_recorder/rank_ in --save"
    )
    flight_recorder_trace_buffer_size: int = flag(
        2000, "number of NCCL collectives that each rank records; 0 disables the flight recorder", at_least=0
    )
    flight_recorder_dump_on_timeout: bool = flag(
        True, "write the recorded NCCL collectives if a collective exceeds the timeout"
    )
    flight_recorder_include_stack_trace: bool = flag(False, "include stack traces in the recorded NCCL collectives")
    flight_recorder_include_only_active: bool = flag(True, "write active NCCL collectives only")
    flight_recorder_extra_dump_on_exec: bool = flag(True, "also write the recorded NCCL collectives after other errors")
    manual_gc: bool = flag(
        False, "disable Python's automatic garbage collection, so that all ranks collect at the same time"
    )
    manual_gc_interval: int = flag(
        0,
        "number of iterations between garbage collections with --manual-gc; 0 collects at evaluations only",
        at_least=0,
    )
    manual_gc_eval: bool = flag(True, "with --manual-gc, collect garbage before and after each evaluation")
