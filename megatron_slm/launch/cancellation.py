"""Cancellation of jobs, and removal of their locks and incomplete checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_slm.launch import slurm
from megatron_slm.launch.records import JobRecord, queued_states
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.lock import LOCK_FILE, locking_job, remove_lock_of_job

SECONDS_BETWEEN_QUERIES = 1.0
TIMEOUT = 300.0  # seconds for the processes to end; Slurm kills them after its KillWait


def cancel(jobs: Sequence[JobRecord], timeout: float = TIMEOUT) -> Iterator[str]:
    """Cancel jobs, wait for their processes to end, and remove their locks and incomplete checkpoints.

    Yields:
        one line per job and removed lock.

    Raises:
        ConfigError: Slurm cannot be reached, or processes of a job do not end.
    """
    active = {state.job_id for state in queued_states(jobs) if not state.has_ended}
    slurm.cancel(sorted(active, key=int))
    _wait(jobs, timeout)
    for job in jobs:
        yield (
            f"{job.stage}: job {job.job_id} is cancelled" if job.job_id in active else f"{job.stage}: not in the queue"
        )
        for save in job.saves():
            yield from _clean(save)


def _wait(jobs: Sequence[JobRecord], timeout: float) -> None:
    end = time.monotonic() + timeout
    while running := [state for state in queued_states(jobs) if not state.has_ended]:
        if time.monotonic() > end:
            names = ", ".join(f"{state.task_id} ({state.state} on {state.nodes or 'no node'})" for state in running)
            raise ConfigError(
                f"jobs have not ended within {timeout:g} s: {names}. Check the nodes with sinfo, then run the command "
                "again."
            )
        time.sleep(SECONDS_BETWEEN_QUERIES)


def _clean(save: Path) -> Iterator[str]:
    """Remove the lock of an ended job, and incomplete checkpoints if no run is active."""
    job_id = locking_job(save)
    if job_id is not None and all(state.has_ended for state in slurm.queue([job_id])):
        remove_lock_of_job(save, job_id)
        yield f"removed the lock of job {job_id} in {save}"
    if save.is_dir() and not (save / LOCK_FILE).exists():
        from megatron_slm.training.save_directory import remove_leftovers

        remove_leftovers(save)
