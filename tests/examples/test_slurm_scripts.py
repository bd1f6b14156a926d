"""Test the batch script of a pretraining job with fake Slurm commands."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "pretrain.sbatch"
STEP = """#!/bin/bash
trap 'sleep 0.5; exit {code}' USR1
touch "$STARTED"
for _ in $(seq 300); do sleep 0.1; done
"""


@pytest.mark.parametrize(("code", "is_requeued"), [(0, True), (1, False)])
def test_warned_job_waits_for_its_checkpoint_and_is_requeued(tmp_path: Path, code: int, is_requeued: bool) -> None:
    started, calls = tmp_path / "started", tmp_path / "calls"
    for name, text in (("srun", STEP.format(code=code)), ("scontrol", f'#!/bin/bash\necho "$@" >> {calls}\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "STARTED": str(started)}
    job = subprocess.Popen(["bash", SCRIPT], env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    while not started.exists():
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    assert ("requeue 7" in calls.read_text()) == is_requeued
