"""Test the batch script of a pretraining job with fake Slurm commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "pretrain.sbatch"


@pytest.mark.parametrize(
    ("step", "code", "is_requeued"),
    [("touch $RUN/slm_stopped", 0, True), ("true", 0, False), ("touch $RUN/slm_stopped; exit 2", 2, False)],
)
def test_stopped_run_is_requeued(tmp_path: Path, step: str, code: int, is_requeued: bool) -> None:
    for name, text in (("srun", step), ("scontrol", f'echo "$@" >> {tmp_path}/calls')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7", "RUN": str(tmp_path)}
    variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    assert subprocess.run(["bash", SCRIPT], env=os.environ | variables).returncode == code
    assert (tmp_path / "calls").exists() == is_requeued
