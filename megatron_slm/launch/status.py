"""Status of submitted jobs: state in Slurm, training step, rate and time left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_slm.config.paths import METRICS_FILE
from megatron_slm.launch import slurm
from megatron_slm.launch.records import JobRecord, queued_states
from megatron_slm.launch.slurm import JobState
from megatron_slm.runtime.append import is_stream
from megatron_slm.runtime.console import format_duration

TAIL = 1 << 18  # bytes at the end of a metrics file, which may have many records of evaluations
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
FINISHED, LOST = "FINISHED", "ENDED"


@dataclass(frozen=True)
class RunStatus:
    """Represent the status of one run: a job, or one seed of an array."""

    name: str
    job_id: str
    state: str  # of Slurm; FINISHED or FAILED from the script's record; ENDED if nothing is known
    detail: str
    step: int | None = None
    iterations: int | None = None
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    def line(self) -> str:
        """Return one line for a terminal."""
        parts = [f"{self.name}: {self.state}", f"job {self.job_id}" if self.job_id else "", self.detail]
        if self.step is not None:
            parts.append(f"step {self.step}" + (f"/{self.iterations}" if self.iterations else ""))
        if self.state == "RUNNING" and self.seconds_per_step is not None and self.tokens_per_second is not None:
            parts.append(f"{self.seconds_per_step:.3g} s/step, {self.tokens_per_second:,.0f} tokens/s")
            if self.seconds_left is not None:
                parts.append(f"{format_duration(self.seconds_left)} left")
        return "  ".join(part for part in parts if part)

    def values(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return asdict(self)


def status_of(jobs: Sequence[JobRecord]) -> list[RunStatus]:
    """Return the status of each job, and of each seed of an array, from Slurm, its accounting and the run's files."""
    queued = queued_states(jobs)
    known = {state.job_id for state in queued}
    accounted = slurm.recorded_states([job.job_id for job in jobs if job.job_id and job.job_id not in known])
    failed: dict[str, str] = {}  # stages that will not succeed
    found = []
    for job in jobs:
        blocked = next((name for name in job.after if name in failed), None)
        for index, seed in enumerate(job.seeds or [None]):
            state = _queue_state(job, index, queued)
            status = _status(job, index, seed, state, accounted, blocked)
            found.append(status)
            if status.state not in (FINISHED, "RUNNING", "COMPLETED", "COMPLETING", *WAITING):
                failed[job.stage] = status.state
    return found


def _status(
    job: JobRecord,
    index: int,
    seed: int | None,
    state: JobState | None,
    accounted: Mapping[str, str],
    blocked: str | None,
) -> RunStatus:
    ended = job.ended(seed)
    if state is not None and not state.has_ended:
        name, detail = state.state, _progress(state)
    elif ended is not None:
        name, detail = (FINISHED, "") if ended[0] == 0 else ("FAILED", f"exit code {ended[0]}: {ended[1]}")
    else:
        task = f"{job.job_id}_{index}" if job.seeds else job.job_id
        name = state.state if state is not None else accounted.get(task, LOST)
        detail = f"it depends on {blocked}, which did not succeed" if blocked else _unrecorded(name)
        name = "CANCELLED" if blocked and name == LOST else name
    label = job.stage if seed is None else f"{job.stage} seed {seed}"
    return RunStatus(label, job.job_id, name, detail, iterations=job.iterations, **_metrics(job, seed))


def _queue_state(job: JobRecord, index: int, queued: Sequence[JobState]) -> JobState | None:
    """Return the state of a job or array task; pending tasks share one entry such as 12_[3-5]."""
    states = [state for state in queued if state.job_id == job.job_id]
    if not job.seeds:
        return states[0] if states else None
    exact = [state for state in states if state.task == index]
    pending = [state for state in states if "[" in state.task_id]
    return next(iter([*exact, *pending]), None)


def _progress(state: JobState) -> str:
    if state.state in WAITING:
        return f"({state.reason})" if state.reason not in ("", "None") else ""
    limit = f", {state.left} to the limit" if state.left not in ("", "UNLIMITED", "INVALID", "NOT_SET") else ""
    return f"{state.elapsed} on {state.nodes}{limit}"


def _unrecorded(name: str) -> str:
    return (
        ""
        if name in ("COMPLETED", "CANCELLED")
        else "without a record of its script, for example because it was killed"
    )


def _metrics(job: JobRecord, seed: int | None) -> dict[str, Any]:
    path = job.metrics if seed is None else str(Path(job.save or job.run_dir) / f"seed-{seed}" / METRICS_FILE)
    record = last_training_record(Path(path)) if path is not None else None
    if record is None:
        return {}
    return {
        "step": record["step"],
        "seconds_per_step": _number(record.get("seconds")),
        "tokens_per_second": _number(record.get("tokens_per_second")),
        "seconds_left": _number(record.get("seconds_left")),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def last_training_record(path: Path) -> dict[str, Any] | None:
    """Return the newest training metrics near the end of a metrics file, or None."""
    if is_stream(path) or not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(file.tell() - TAIL, 0))
        lines = file.read().splitlines(keepends=True)
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):
            record = json.loads(line) if line.endswith(b"\n") else None
            if isinstance(record, dict) and record.get("kind") == "train" and isinstance(record.get("step"), int):
                return record
    return None
