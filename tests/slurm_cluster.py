"""Private Slurm cluster with two nodes on this machine, for tests with real jobs; needs root, slurm-wlm and munge."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
NODES = 2
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
JobRequeue=1
FirstJobId={first_job}
"""
NODE = "NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 State=UNKNOWN\n"


def missing() -> str:
    """Return the reason why a cluster cannot run on this machine, or an empty string."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "needs root"


class SlurmCluster:
    """Context manager that runs munge, a controller and two nodes; ``environment`` configures Slurm's commands.

    Args:
        directory: empty directory for all files.
        settings: additional lines of slurm.conf.
    """

    def __init__(self, directory: Path, settings: str = "") -> None:
        self.directory = directory
        self.settings = settings
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}",
        }

    def __enter__(self) -> SlurmCluster:
        self._configure()
        self._start_munge()
        try:
            self.run("slurmctld")
            for number in range(NODES):
                self.start_node(number)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        names = [*(f"slurmd-node{number}" for number in range(NODES)), "slurmctld", "munged"]
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.directory / f"{name}.pid").read_text()), signal.SIGTERM)

    def run(self, *command: str, timeout: float = 60, **variables: str) -> str:
        """Run a Slurm command with additional environment variables and return its output."""
        result = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.directory,
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def start_node(self, number: int) -> None:
        """Start the daemon of a node."""
        self.run("slurmd", "-N", f"node{number}")

    def fail_node(self, number: int) -> None:
        """Kill the daemon of a node and all processes of its jobs, as a power failure does."""
        os.kill(int((self.directory / f"slurmd-node{number}.pid").read_text()), signal.SIGKILL)
        for process in self.processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self, number: int | None = None, job: str | None = None) -> list[psutil.Process]:
        """Return the processes of jobs and their supervisors, on one node or of one job if given."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                node, runs = variables.get("SLURMD_NODENAME"), variables.get("SLURM_JOB_ID")
                if variables.get("SLURM_CONF") != self.environment["SLURM_CONF"] or runs is None or node is None:
                    continue
                if number in (None, int(node.removeprefix("node"))) and job in (None, runs):
                    found |= {process, *(each for each in process.parents() if each.name() == "slurmstepd")}
        return list(found)

    def state(self, job: str) -> str:
        """Return the state of a job, for example RUNNING; COMPLETED and FAILED for a while after its end."""
        fields = dict(
            field.split("=", 1)
            for field in self.run("scontrol", "--oneliner", "show", "job", job).split()
            if "=" in field
        )
        return fields["JobState"]

    def _configure(self) -> None:
        host = socket.gethostname()
        for name in ("state", *(f"spool-node{number}" for number in range(NODES))):
            (self.directory / name).mkdir()
        controller, *ports = free_ports(1 + NODES)
        # Ranks meet at a port derived from the job's number, and all clusters share the ports of this machine.
        first_job = random.randrange(1, 1_000_000)
        text = CONFIGURATION.format(host=host, controller=controller, directory=self.directory, first_job=first_job)
        text += "".join(NODE.format(number=number, host=host, port=port) for number, port in enumerate(ports))
        text += self.settings
        text += "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        (self.directory / "slurm.conf").write_text(text)

    def _start_munge(self) -> None:
        self.directory.chmod(0o755)
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            name: self.directory / f"munge.{suffix}"
            for name, suffix in (("socket", "socket"), ("seed-file", "seed"), ("log-file", "log"))
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self.run("munged", "--force", f"--key-file={key}", f"--pid-file={self.directory / 'munged.pid'}", *options)

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 30
        while self.run("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            assert time.monotonic() < deadline, self.run("sinfo", "--long", "--Node")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return unused ports of this machine."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
