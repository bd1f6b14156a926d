"""Output of a job, whose lines srun prefixes with the rank."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_slm.launch.records import JobRecord
from megatron_slm.runtime.errors import ConfigError

SECONDS_BETWEEN_READS = 1.0
LABEL = re.compile(r" *(\d+): ")  # of srun --label
BLOCK = 1 << 16


def find_log(job: JobRecord, seed: int | None) -> Path:
    """Return the log file of a job, or of one seed of an array.

    Raises:
        ConfigError: the seed is missing or unknown.
    """
    if not job.seeds:
        if seed is not None:
            raise ConfigError(f"--seed {seed}: {job.run_dir} is no array job. Leave the flag out.")
        return job.records / f"{job.job_id}.log"
    if seed not in job.seeds:
        raise ConfigError(f"{job.run_dir} is an array job: give --seed, one of {', '.join(map(str, job.seeds))}.")
    return job.records / f"{job.job_id}_{job.seeds.index(seed)}.log"


def last_lines(path: Path, count: int, rank: int | None = None) -> tuple[list[str], int]:
    """Return the last lines, of one rank if given, and the position after the last complete line."""
    with path.open("rb") as file:
        content = file.read()
    end = content.rfind(b"\n") + 1
    lines = content[:end].decode("utf-8", errors="replace").splitlines()
    kept = [line for line in lines if is_of_rank(line, rank)]
    return kept[-count:] if count else [], end


def follow(path: Path, position: int, is_active: Callable[[], bool], rank: int | None = None) -> Iterator[str]:
    """Yield the lines that are appended to a log until its job has ended."""
    rest = b""
    while True:
        active = is_active()
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                while block := file.read(BLOCK):
                    position += len(block)
                    *lines, rest = (rest + block).split(b"\n")
                    for line in lines:
                        text = line.decode("utf-8", errors="replace")
                        if is_of_rank(text, rank):
                            yield text
        if not active:
            if rest:
                yield rest.decode("utf-8", errors="replace")
            return
        time.sleep(SECONDS_BETWEEN_READS)


def is_of_rank(line: str, rank: int | None) -> bool:
    """Return whether a line is the output of this rank; None stands for all ranks and for Slurm."""
    if rank is None:
        return True
    label = LABEL.match(line)
    return label is not None and int(label[1]) == rank
