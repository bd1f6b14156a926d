"""Launch environment: rank, world size and rendezvous address from the variables of torchrun or srun.

This is the only source of the rank before the process group exists. The module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_slm.runtime.errors import ConfigError

FIRST_PORT, PORTS = 10_000, 20_000  # below the ephemeral ports of Linux
FIRST_SPECIAL_STEP = 0xFFFF_FF00  # step ids of batch scripts and interactive shells are the highest 32-bit numbers
STEP_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
STEP_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
SHELLS = ("bash", "interactive", "sh", "zsh")  # job names of interactive allocations
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # variables of mpirun
TORCHRUN_REMEDY = "Start the ranks with torchrun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
LOOPBACK = "127.0.0.1"

Variables = Mapping[str, str]


@dataclass(frozen=True)
class Launch:
    """Rank and rendezvous address of this process."""

    launcher: str  # "torchrun" (or any launcher that sets RANK), "srun", or "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank on this node
    address: str | None = None  # of rank 0; None for a single process
    port: int | None = None


@dataclass(frozen=True)
class _Step:
    """Task number of this process in an srun step."""

    task: int
    tasks: int
    local: int


@dataclass(frozen=True)
class SlurmJob:
    """Slurm job of a process and the number of its requeues; the id is empty without Slurm."""

    job_id: str = ""
    restarts: int = 0

    def is_restart_of(self, earlier: SlurmJob) -> bool:
        """Return whether this is the same job after a requeue, so that all processes of ``earlier`` have ended."""
        return bool(self.job_id) and self.job_id == earlier.job_id and self.restarts > earlier.restarts


def slurm_job(env: Variables = os.environ) -> SlurmJob:
    """Return the Slurm job of this process."""
    return SlurmJob(env.get("SLURM_JOB_ID", "").strip(), _first_readable(env, "SLURM_RESTART_COUNT"))


def read_launch(env: Variables = os.environ) -> Launch:
    """Return rank and address of this process from the launcher's variables; empty variables count as unset.

    Raises:
        ConfigError: variables are malformed, missing or contradictory.
    """
    env = {name: value.strip() for name, value in env.items() if value.strip()}
    step = _read_step(env)
    if "RANK" in env:
        return _launch_from_rank(env, step)
    world_size = _number(env, "WORLD_SIZE", least=1)
    if step is not None:
        _require_equal("WORLD_SIZE", world_size, step.tasks)
        return _with_address(Launch("srun", step.task, step.tasks, step.local), env, step)
    if world_size is not None and world_size > 1:
        raise ConfigError(f"WORLD_SIZE is {world_size}, and RANK is not set. {TORCHRUN_REMEDY}")
    _refuse_other_launchers(env)
    return Launch("none")


def launched_rank(env: Variables = os.environ) -> int:
    """Return the rank of this process, or the best guess if the variables are malformed; for messages."""
    return guess_launch(env).rank


def guess_launch(env: Variables = os.environ) -> Launch:
    """Return rank and address of this process; if the variables are contradictory, trust srun, then RANK."""
    with contextlib.suppress(ConfigError):
        return read_launch(env)
    if "TORCHELASTIC_RUN_ID" not in env:
        with contextlib.suppress(ConfigError):
            launch = read_launch({name: value for name, value in env.items() if name.startswith("SLURM_")})
            if launch.launcher == "srun":
                return launch
    rank = _first_readable(env, "RANK", "SLURM_PROCID")
    return Launch("none", rank, rank + 1, _first_readable(env, "LOCAL_RANK", "SLURM_LOCALID"))


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as ``node[01-03,7],gpu5``.

    Raises:
        ConfigError: the list is malformed.
    """
    match = re.match(r"(?:[^\[\],\s]|\[[^\[\]]*\])+", nodes)
    host = re.sub(r"\[(\d*)[^\]]*\]", r"\1", match.group()) if match else ""
    if match is None or re.search(r"\[\D", match.group()) or nodes[match.end() :][:1] not in ("", ","):
        raise ConfigError(f"the Slurm node list {nodes!r} cannot be parsed. Set MASTER_ADDR to the host of rank 0.")
    return host


def expand_hosts(nodes: str) -> list[str]:
    """Return the hosts of a Slurm node list such as ``node[01-03,7],gpu5``, in its order.

    Raises:
        ConfigError: the list is malformed.
    """
    first_host(nodes)
    hosts: list[str] = []
    for name in re.findall(r"(?:[^\[\],\s]|\[[^\[\]]*\])+", nodes):
        expanded = [""]
        for fixed, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", name):
            numbers = [fixed] if fixed else [number for part in ranges.split(",") for number in _numbers(part)]
            expanded = [head + number for head in expanded for number in numbers]
        hosts += expanded
    return hosts


def _numbers(part: str) -> list[str]:
    """Return the numbers of a range such as 08-11, with leading zeros."""
    first, dash, last = part.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"{part!r} is no range of numbers in a Slurm node list. Check SLURM_JOB_NODELIST.")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _read_step(env: Variables) -> _Step | None:
    """Return the srun step of this process; None outside a step, for example in a batch script or salloc shell."""
    if "SLURM_PROCID" not in env or not _is_started_by_srun(env):
        return None
    task = _number(env, "SLURM_PROCID")
    assert task is not None
    counts = (_number(env, name, least=1) for name in STEP_TASKS)
    tasks = next((count for count in counts if count is not None), None)
    if tasks is None:
        if task == 0:
            return None
        raise ConfigError(f"SLURM_PROCID is {task}, and SLURM_NTASKS is not set. Start the ranks with srun --ntasks.")
    if task >= tasks:
        raise ConfigError(f"SLURM_PROCID is {task}, and must be below SLURM_NTASKS {tasks}.")
    local = _number(env, "SLURM_LOCALID")
    if local is None:
        local = task if _is_on_one_node(env) else 0
    return _Step(task, tasks, local)


def _is_started_by_srun(env: Variables) -> bool:
    step_id = env.get("SLURM_STEP_ID") or env.get("SLURM_STEPID")
    if step_id is not None:
        return step_id.isdecimal() and int(step_id) < FIRST_SPECIAL_STEP
    if env["SLURM_PROCID"] != "0":
        return True
    return env.get("ENVIRONMENT") != "BATCH" and env.get("SLURM_JOB_NAME") not in SHELLS


def _launch_from_rank(env: Variables, step: _Step | None) -> Launch:
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE", least=1)
    assert rank is not None
    if world_size is None:
        if step is None:
            raise ConfigError(f"RANK is {rank}, and WORLD_SIZE is not set. {TORCHRUN_REMEDY}")
        world_size = step.tasks
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}, and must be below WORLD_SIZE {world_size}. {TORCHRUN_REMEDY}")
    if step is not None:
        _compare_with_step(env, step, rank, world_size)
    local, local_size = _number(env, "LOCAL_RANK"), _number(env, "LOCAL_WORLD_SIZE", least=1)
    if local is not None and local >= (local_size or world_size):
        raise ConfigError(
            f"LOCAL_RANK is {local}, and must be below the number of ranks on this node, {local_size or world_size}."
        )
    if local is None:
        local = step.local if step is not None else 0
    return _with_address(Launch("torchrun", rank, world_size, local), env, step)


def _compare_with_step(env: Variables, step: _Step, rank: int, world_size: int) -> None:
    """Raise ConfigError if the tasks of the srun step would train as several independent runs."""
    agents = _number(env, "GROUP_WORLD_SIZE", least=1)  # set by torchrun to its --nnodes
    if agents is not None:
        if agents != step.tasks:
            raise ConfigError(
                f"srun started {step.tasks} tasks, and torchrun has --nnodes {agents}, so each task would be an "
                f"independent run. Give torchrun --nnodes {step.tasks} and --rdzv-endpoint, or start one task. For "
                "independent runs, and in an interactive shell, unset SLURM_PROCID."
            )
        return
    if world_size > step.tasks and "LOCAL_WORLD_SIZE" in env:
        return  # a launcher between srun and this process
    _require_equal("WORLD_SIZE", world_size, step.tasks)
    if rank != step.task:
        raise ConfigError(
            f"RANK is {rank}, and srun started this process as task {step.task} (SLURM_PROCID). Unset RANK and "
            "WORLD_SIZE, which srun's variables give."
        )


def _require_equal(name: str, world_size: int | None, tasks: int) -> None:
    if world_size is not None and world_size != tasks:
        raise ConfigError(
            f"{name} is {world_size}, and srun started {tasks} tasks (SLURM_NTASKS). Unset {name}, or start "
            f"{world_size} tasks with srun --ntasks {world_size}. For independent runs, and in an interactive shell, "
            "unset SLURM_PROCID."
        )


def _with_address(launch: Launch, env: Variables, step: _Step | None) -> Launch:
    """Add the rendezvous address, which a single process does not need."""
    if launch.world_size == 1:
        return launch
    address, port = env.get("MASTER_ADDR"), _number(env, "MASTER_PORT", least=1)
    if port is not None and port > 65_535:
        raise ConfigError(f"MASTER_PORT is {port}, and must be at most 65535.")
    if address is None and step is not None:
        address = _step_address(env)
    if port is None and step is not None:
        port = _step_port(env)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is None:
            raise ConfigError(f"WORLD_SIZE is {launch.world_size}, and {name} is not set. {TORCHRUN_REMEDY}")
    return Launch(launch.launcher, launch.rank, launch.world_size, launch.local_rank, address, port)


def _step_address(env: Variables) -> str:
    """Return the host of the first task of the step."""
    if _is_on_one_node(env):
        return LOOPBACK
    nodes = next((env[name] for name in NODE_LISTS if name in env), None)
    if nodes is None:
        raise ConfigError(
            "started by srun, and neither MASTER_ADDR nor SLURM_JOB_NODELIST is set. Set MASTER_ADDR to the host of "
            "rank 0."
        )
    return first_host(nodes)


def _is_on_one_node(env: Variables) -> bool:
    counts = (_number(env, name, least=1) for name in STEP_NODES)
    count = next((count for count in counts if count is not None), None)
    if count is not None:
        return count == 1
    nodes = next((env[name] for name in NODE_LISTS if name in env), None)
    return nodes is not None and re.fullmatch(r"[^\[\],]+(\[\d+\][^\[\],]*)?", nodes) is not None


def _step_port(env: Variables) -> int:
    """Return a port derived from job and step, to avoid collisions on a node."""
    job = _number(env, "SLURM_JOB_ID") or _number(env, "SLURM_JOBID") or 0
    return FIRST_PORT + (job * 257 + (_number(env, "SLURM_STEP_ID") or 0)) % PORTS


def _refuse_other_launchers(env: Variables) -> None:
    for name in OTHER_LAUNCHERS:
        if (_number(env, name, least=1) or 1) > 1:
            raise ConfigError(
                f"started by mpirun ({name}={env[name]}), whose processes would train as independent runs. "
                f"{TORCHRUN_REMEDY}"
            )


def _number(env: Variables, name: str, least: int = 0) -> int | None:
    """Return the integer value of a variable, or None if it is unset."""
    text = env.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ConfigError(f"the environment variable {name} is {text!r}, and must be an integer of {least} or more.")
    return int(text)


def _first_readable(env: Variables, *names: str) -> int:
    texts = (env.get(name, "").strip() for name in names)
    return next((int(text) for text in texts if text.isascii() and text.isdecimal()), 0)
