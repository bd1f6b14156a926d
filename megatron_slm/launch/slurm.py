"""Slurm's commands: submission, states of jobs, cancellation."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.runtime.errors import ConfigError

SECONDS = 120  # for an answer of Slurm's controller
# array or job id, task id, state, elapsed, left, reason, nodes, batch script with its arguments
FIELDS = ("%F", "%i", "%T", "%M", "%L", "%r", "%N", "%o")
ENDED_STATES = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REVOKED", "TIMEOUT"),
    }
)


@dataclass(frozen=True)
class JobState:
    """Represent the state of a job, or of one task of an array, in Slurm's queue."""

    job_id: str  # of the array, if any
    task_id: str  # 12, 12_3, or 12_[3-5]
    state: str
    elapsed: str = ""
    left: str = ""
    reason: str = ""
    nodes: str = ""
    command: str = ""  # batch script; empty if unknown

    @property
    def has_ended(self) -> bool:
        """Return whether the job has ended; one that is completing has not."""
        return self.state in ENDED_STATES

    @property
    def task(self) -> int | None:
        """Return the number of the array task, or None."""
        _, underscore, task = self.task_id.partition("_")
        return int(task) if underscore and task.isdecimal() else None


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """Submit a script and return the job id.

    Args:
        script: batch script.
        after: ids of jobs that must succeed first; if one fails, Slurm cancels this job.

    Raises:
        ConfigError: Slurm refuses the job, or cannot be reached.
    """
    options = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    answer = _run(["sbatch", "--parsable", *options, str(script)], env=_submission_environment(script))
    job_id = answer.strip().rpartition("\n")[2].partition(";")[0]
    if not job_id.isdecimal():
        raise ConfigError(f"sbatch {script}: {answer.strip()!r} is no job id. Check the queue with squeue --me.")
    return job_id


def queue(job_ids: Sequence[str]) -> list[JobState]:
    """Return the states of jobs that Slurm's controller knows; it forgets ended jobs after some minutes.

    Raises:
        ConfigError: Slurm cannot be reached.
    """
    if not job_ids:
        return []
    command = ["squeue", "--noheader", "--states=all", f"--format={'|'.join(FIELDS)}", f"--jobs={','.join(job_ids)}"]
    try:
        lines = _run(command).splitlines()
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    return [JobState(*line.strip().split("|", len(FIELDS) - 1)) for line in lines if line.count("|") >= len(FIELDS) - 1]


def recorded_states(job_ids: Sequence[str]) -> dict[str, str]:
    """Return the states of jobs in Slurm's accounting by job or task id; empty on a cluster without accounting."""
    if not job_ids:
        return {}
    command = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=JobID,State",
        f"--jobs={','.join(job_ids)}",
    ]
    with suppress(ConfigError):
        rows = (line.split("|") for line in _run(command).splitlines())
        return {row[0]: row[1].split(" ")[0] for row in rows if len(row) == 2}
    return {}


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are no error.

    Raises:
        ConfigError: Slurm cannot be reached, or the jobs are those of another user.
    """
    if job_ids:
        _run(["scancel", "--quiet", *job_ids])


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"{command[0]} is not installed on this machine. Run the command on a login node of the cluster, or print "
            "the script with --dry-run."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} gave no answer within {SECONDS} s. Check Slurm with sinfo.") from error
    if result.returncode:
        reason = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        raise ConfigError(f"{command[0]} failed: {reason}")
    return result.stdout


def _submission_environment(script: Path) -> dict[str, str]:
    """Return the environment for sbatch, without variables that override the script or come from an enclosing job."""
    options = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    overrides = {f"SBATCH_{option.replace('-', '_').upper()}" for option in options}
    is_in_job = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if name not in overrides and not (is_in_job and name.startswith("SLURM_") and name != "SLURM_CONF")
    }
