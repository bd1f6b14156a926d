"""Stand-ins for Slurm's commands, with which bash runs generated scripts without a cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

RECORDER = """#!/bin/bash
number=$(cat "$STUB/count" 2> /dev/null || echo 0)
echo $((number + 1)) > "$STUB/count"
printf '%s\\0' "${0##*/}" "$@" > "$STUB/call-$number"
[ ! -e "$STUB/action-$number" ] || source "$STUB/action-$number"
exit "$(cat "$STUB/code-$number" 2> /dev/null || echo 0)"
"""


class Result(NamedTuple):
    """Exit code and error messages of a script, and the arguments of the commands that it ran, in order."""

    code: int
    errors: str
    calls: list[list[str]]


class StubSlurm:
    """Directory of stand-ins that record their arguments."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "bin").mkdir(parents=True)
        for name in ("srun", "scontrol", "module"):
            path = directory / "bin" / name
            path.write_text(RECORDER)
            path.chmod(0o755)

    def run(self, script: str, *codes: int, actions: tuple[str, ...] = (), **variables: str) -> Result:
        """Run a script; the n-th command of Slurm that it calls ends with the n-th code, after the n-th action."""
        for path in self.directory.glob("*-[0-9]*"):
            path.unlink()
        (self.directory / "count").unlink(missing_ok=True)
        for number, code in enumerate(codes):
            (self.directory / f"code-{number}").write_text(str(code))
        for number, action in enumerate(actions):
            (self.directory / f"action-{number}").write_text(action)
        path = self.directory / "script.sbatch"
        path.write_text(script, encoding="utf-8")
        environment = {
            **os.environ,
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "STUB": str(self.directory),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            **variables,
        }
        result = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, timeout=30)
        calls = sorted(self.directory.glob("call-*"), key=lambda call: int(call.name.removeprefix("call-")))
        return Result(result.returncode, result.stderr, [call.read_text().split("\0")[:-1] for call in calls])
