"""Settings of a job: nodes, limits, environment, container."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_slm.config.recipe import check_text
from megatron_slm.launch.quoting import check_line
from megatron_slm.runtime.errors import ConfigError, refuse

PRETRAIN = "pretrain"
PYXIS, APPTAINER = "pyxis", "apptainer"
SRUN, TORCHRUN = "srun", "torchrun"
TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[a-z][a-z-]*")
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # srun's variables give them
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")  # replace --gpus-per-node
MANAGED = {  # sbatch options that the script sets, with the flag to use instead
    **{name: f"--{name}" for name in ("nodes", "partition", "account", "qos", "time", "cpus-per-task", "requeue")},
    "job-name": "--name",
    "ntasks-per-node": "--ranks-per-node",
    "ntasks": "--ranks-per-node",
    "array": "--seeds",
    "no-requeue": "--no-requeue",
    "signal": "--signal-time",
    "output": "--run-dir",
    "error": "--run-dir",
    "chdir": "the working directory",
    "open-mode": "--run-dir",
    "wrap": "--setup",
    "parsable": "no flag",
    "kill-on-invalid-dep": "a chain",
    "export-file": "--env",
    "test-only": "--dry-run",
}


@dataclass(frozen=True)
class JobSettings:
    """Represent the settings of a job; None leaves the choice to Slurm."""

    nodes: int = 1
    spare_nodes: int = 0  # allocated in addition, for nodes that fail the check
    gpus_per_node: int = 8
    ranks_per_node: int | None = None  # default one per GPU
    cpus_per_task: int | None = None
    name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    signal_time: int = 300
    requeue: bool = True
    restarts: int = 3
    launcher: str = SRUN
    container_image: str | None = None
    container_runtime: str = PYXIS
    container_mounts: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    module: list[str] = field(default_factory=list)
    venv: str | None = None
    python: str | None = None
    setup: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)
    check_nodes: bool = True

    @property
    def node_ranks(self) -> int:
        """Return the number of ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.nodes * self.node_ranks

    @property
    def node_tasks(self) -> int:
        """Return the number of srun's tasks on a node."""
        return 1 if self.launcher == TORCHRUN else self.node_ranks

    @property
    def allocated_nodes(self) -> int:
        """Return the number of nodes that Slurm allocates."""
        return self.nodes + self.spare_nodes

    @property
    def interpreter(self) -> str:
        """Return the Python interpreter of the job."""
        if self.python is not None:
            return self.python
        if self.venv is not None:
            return str(Path(self.venv).absolute() / "bin" / "python")
        return "python" if self.container_image is not None else sys.executable

    @property
    def sbatch_options(self) -> list[tuple[str, str | None]]:
        """Return the additional sbatch options as names and values."""
        split = (option.lstrip("-").partition("=") for option in self.sbatch)
        return [(name, value if equals else None) for name, equals, value in split]

    def check(self) -> None:
        """Raise ConfigError with all problems of the settings."""
        refuse(list(self._problems()))

    def _problems(self) -> Iterator[str]:
        limits = {"nodes": 1, "spare_nodes": 0, "ranks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": 0}
        for name, least in limits.items():
            yield from _below(name, getattr(self, name), least)
        if self.spare_nodes and not self.check_nodes:
            yield "--spare-nodes has no effect with --no-check-nodes. Leave out one of them."
        yield from _below("signal_time", self.signal_time, 1)
        yield from _below("restarts", self.restarts, 0)
        if self.signal_time > 65535:
            yield f"--signal-time {self.signal_time} exceeds Slurm's limit of 65535 seconds."
        if self.time is not None and not TIME.fullmatch(self.time):
            yield f"--time {self.time!r} is no time of Slurm. Write minutes, HH:MM:SS or DAYS-HH:MM:SS."
        elif self.time is not None and 0 < (limit := limit_seconds(self.time)) <= self.signal_time:
            yield (
                f"--signal-time {self.signal_time}: SIGUSR1 would be sent at the start of a job of --time {self.time}, "
                f"{limit:g} s. Lower --signal-time, or raise --time."
            )
        texts = ("name", "partition", "account", "qos", "container_image", "venv", "python")
        values = [(name, value) for name in texts if (value := getattr(self, name)) is not None]
        lists = [(name, each) for name in ("container_mounts", "module", "sbatch") for each in getattr(self, name)]
        for name, value in (*values, *lists):
            yield from _violations(check_line, value, f"--{name.replace('_', '-')}")
        yield from self._environment_problems()
        yield from self._container_problems()
        yield from self._sbatch_problems()
        for seed in sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            yield f"--seeds has {seed} twice; give each seed once."
        yield from (f"--seeds {seed} is negative; give a seed of 0 or more." for seed in self.seeds if seed < 0)

    def _environment_problems(self) -> Iterator[str]:
        for assignment in self.env:
            name, equals, value = assignment.partition("=")
            if not equals or not ENV_NAME.fullmatch(name):
                yield f"--env {assignment!r} must be NAME=VALUE with a name of letters, digits and underscores."
            elif name in LAUNCH_VARIABLES or name.startswith("SLURM_"):
                yield f"--env {name}: Slurm sets this variable for every rank. Leave it out."
            else:
                yield from _violations(check_text, value, f"--env {name}")
        for line in self.setup:
            yield from _violations(check_text, line, "--setup")

    def _container_problems(self) -> Iterator[str]:
        if self.container_image is None and self.container_mounts:
            yield "--container-mounts needs --container-image."
        if self.container_image is None and self.container_runtime != PYXIS:
            yield f"--container-runtime {self.container_runtime} needs --container-image."
        if self.container_image is not None and self.venv is not None:
            yield "--venv is a directory outside of the container. Use --python for an interpreter in the image."
        for mount in self.container_mounts:
            if "," in mount:
                yield f"--container-mounts {mount!r} has a comma, which separates mounts. Give several arguments."
            elif not all(mount.split(":")):
                yield f"--container-mounts {mount!r} must be SOURCE:TARGET, without an empty part."

    def _sbatch_problems(self) -> Iterator[str]:
        for name, _ in self.sbatch_options:
            if not OPTION.fullmatch(name):
                yield f"--sbatch {name!r} is no option of sbatch. Write NAME or NAME=VALUE, for example mem=0."
            elif name in MANAGED:
                yield f"--sbatch {name}: the script sets this option. Use {MANAGED[name]} instead."


def limit_seconds(time: str) -> float:
    """Return the seconds of a time limit of Slurm, such as 90 (minutes), 24:00:00 or 1-12."""
    if not time[0].isdigit():
        return float("inf")
    days, dash, rest = time.rpartition("-")
    fields = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(number * unit for number, unit in zip(fields, units, strict=False))


def _below(name: str, value: int | None, least: int) -> Iterator[str]:
    if value is not None and value < least:
        yield f"--{name.replace('_', '-')} is {value}, and must be at least {least}."


def _violations(check: Callable[[str, str], object], value: str, location: str) -> Iterator[str]:
    try:
        check(value, location)
    except ConfigError as error:
        yield str(error)
