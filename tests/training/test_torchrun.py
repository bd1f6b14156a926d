"""Test failures under torchrun: one message, and a minimal torchrun report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm import torchrun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RANKS = ["--standalone", "--nproc-per-node", "3"]
BAD = ["-m", "megatron_slm.pretrain", "--lr", "fast"]


def run(module: str, *arguments: str) -> tuple[int, list[str]]:
    result = subprocess.run(
        [sys.executable, "-m", module, *RANKS, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not result.stdout
    return result.returncode, result.stderr.splitlines()


def test_user_error_prints_one_message() -> None:
    code, lines = run("torch.distributed.run", *BAD)
    assert code == 1 and lines[0] == "error: --lr must be a number, not 'fast'."
    assert sum("--lr" in line for line in lines) == 1


def test_user_error_is_one_line_with_the_short_report() -> None:
    assert run("megatron_slm.torchrun", *BAD) == (2, ["error: --lr must be a number, not 'fast'."])


def test_killed_rank_is_one_line_with_the_short_report(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text('import os, time\nif os.environ["RANK"] == "1": os.kill(os.getpid(), 9)\ntime.sleep(60)\n')
    code, lines = run("megatron_slm.torchrun", str(script))
    assert code == 128 + signal.SIGKILL and len(lines) == 1
    assert lines[0].startswith("error: rank 1 (process ") and lines[0].endswith(" was terminated by SIGKILL")


def test_help_is_that_of_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        torchrun.main(["--help"])
    assert end.value.code == 0 and "--nproc-per-node" in capsys.readouterr().out
