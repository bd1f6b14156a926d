"""Test that continuous integration runs with and without Slurm and Chromium, with stand-ins for apt-get and make."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"
PROGRAMS = ("bash", "dirname", "mktemp", "rm", "tail", "timeout")
PACKAGED = ("slurmctld", "slurmd", "srun", "munged", "chromium")
CALLS = ["make setup", "make setup-browser", "make test"]


def run(directory: Path, **programs: str) -> tuple[list[str], str]:
    """Run the script with the given programs only; return its output lines and its messages."""
    for name in PROGRAMS:
        (directory / name).symlink_to(shutil.which(name) or name)
    for name, text in {"make": 'echo make "$@"', **programs}.items():
        (directory / name.replace("_", "-")).write_text(f"#!/usr/bin/env -S {directory}/bash\n{text}\n")
        (directory / name.replace("_", "-")).chmod(0o755)
    result = subprocess.run([SCRIPT], env={"PATH": str(directory)}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize(
    ("programs", "reason"),
    [
        ({"id": "echo 1000"}, "needs root"),
        ({"id": "echo 0"}, "has no apt-get"),
        ({"id": "echo 0", "apt_get": "echo no such package >&2; exit 100"}, "exit code 100 (limit: 150 s): no such"),
        ({"id": "echo 1000", "slurmctld": "", "slurmd": "", "srun": "", "munged": ""}, "that need chromium are"),
    ],
)
def test_packages_that_cannot_be_installed_are_named_and_end_nothing(
    tmp_path: Path, programs: dict[str, str], reason: str
) -> None:
    output, messages = run(tmp_path, **programs)
    assert output == CALLS
    assert "ci: tests that need " in messages and reason in messages


def test_a_browser_that_cannot_be_driven_ends_nothing(tmp_path: Path) -> None:
    programs = {**dict.fromkeys(PACKAGED, ""), "make": 'echo make "$@"; [ "$1" != setup-browser ]'}
    output, messages = run(tmp_path, **programs)
    assert output == CALLS and messages == "ci: tests in a browser are skipped: playwright cannot be installed\n"


def test_missing_packages_are_installed_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "without").mkdir()
    assert run(tmp_path / "without", id="echo 0", apt_get=f'echo "$@" >> {log}') == (CALLS, "")
    assert log.read_text().splitlines()[1].endswith("--no-install-recommends slurm-wlm munge chromium")
    (tmp_path / "with").mkdir()
    assert run(tmp_path / "with", **dict.fromkeys(PACKAGED, ""), id="exit 1") == (CALLS, "")
