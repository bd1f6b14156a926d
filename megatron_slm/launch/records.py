"""Records of submitted jobs in the directories of runs and chains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slm.launch import slurm
from megatron_slm.launch.script import ENDED, RECORDS
from megatron_slm.launch.slurm import JobState
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_regular, is_json_of, write_text

JOB_FILE, CHAIN_FILE, SCRIPT_FILE = "job.json", "chain.json", "job.sbatch"
JOB_KIND, CHAIN_KIND = "slurm-job", "slurm-chain"


@dataclass(frozen=True)
class JobRecord:
    """Represent a submitted job."""

    job_id: str
    stage: str  # name of the job, or of the stage in its chain
    run_dir: str
    save: str | None = None
    metrics: str | None = None  # metrics file of a training run
    iterations: int | None = None
    seeds: list[int] = field(default_factory=list)
    after: list[str] = field(default_factory=list)  # stages
    kind: str = JOB_KIND

    @property
    def records(self) -> Path:
        """Return the directory of script, recipes, logs and state."""
        return Path(self.run_dir) / RECORDS

    def write(self) -> None:
        """Write the record in its run directory."""
        _write(self.records / JOB_FILE, asdict(self))

    def saves(self) -> list[Path]:
        """Return the --save directories of the job."""
        if self.save is None:
            return []
        return [Path(self.save) / f"seed-{seed}" for seed in self.seeds] or [Path(self.save)]

    def ended(self, seed: int | None = None) -> tuple[int, str] | None:
        """Return exit code and message that the script recorded at its end, or None."""
        directory = self.records if seed is None else self.records / f"seed-{seed}"
        try:
            check_regular(directory / ENDED)
            code, _, message = (directory / ENDED).read_text(encoding="utf-8", errors="replace").partition(" ")
            return int(code), message.strip()
        except (OSError, ValueError):
            return None


def write_chain(directory: Path, jobs: list[JobRecord]) -> None:
    """Write the record of a chain."""
    content: dict[str, object] = {
        "kind": CHAIN_KIND,
        "directory": str(directory),
        "jobs": [asdict(job) for job in jobs],
    }
    _write(directory / CHAIN_FILE, content)


def read_jobs(directory: str | Path) -> list[JobRecord]:
    """Return the jobs of a chain, or the job of a run.

    Raises:
        ConfigError: nothing was submitted from the directory.
    """
    if (record := _read_record(Path(directory))) is not None:
        path, content = record
        try:
            return [JobRecord(**job) for job in (content["jobs"] if content["kind"] == CHAIN_KIND else [content])]
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({error}). Submit the run again.") from error
    raise ConfigError(
        f"{directory} holds no job of megatron-slm-launch (no {CHAIN_FILE} and no {RECORDS}/{JOB_FILE}). Give the "
        "directory of a run or a chain; if its files were deleted, find the job with squeue --me."
    )


def original_of(directory: str | Path) -> Path | None:
    """Return the directory of which ``directory`` is a copy, and whose jobs it therefore names; None if of none."""
    root = Path(directory)
    if (record := _read_record(root)) is None:
        return None
    path, content = record
    original = Path(content.get("directory" if content["kind"] == CHAIN_KIND else "run_dir", root))
    is_copy = original.resolve() != root.resolve() and is_json_of(original / path.relative_to(root), content["kind"])
    return original if is_copy else None


def _read_record(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return file and content of the record of a chain, or of a run; None if the directory has neither."""
    for path, kind in ((root / CHAIN_FILE, CHAIN_KIND), (root / RECORDS / JOB_FILE, JOB_KIND)):
        if is_json_of(path, kind):
            return path, json.loads(path.read_text(encoding="utf-8"))
    return None


def queued_states(jobs: Sequence[JobRecord]) -> list[JobState]:
    """Return the states of jobs that Slurm's controller knows.

    A job with the same id but another script is not ours: two clusters may share a file system, and a new installation
    of Slurm counts from 1 again.

    Raises:
        ConfigError: Slurm cannot be reached.
    """
    scripts = {job.job_id: str(job.records / SCRIPT_FILE) for job in jobs if job.job_id}
    states = slurm.queue(list(scripts))
    return [state for state in states if not state.command or scripts[state.job_id] in state.command]


def _write(path: Path, content: dict[str, object]) -> None:
    is_ours = partial(is_json_of, kind=str(content["kind"]))
    write_text(path, json.dumps(content, indent=1) + "\n", "--run-dir", is_ours=is_ours)
