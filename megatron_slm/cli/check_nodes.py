"""Command line of the node check: one process per node, started by srun before the ranks.

Each process connects to the first one, which decides on the health of all nodes and writes the result. The processes
import no torch: the checks of the devices run in processes of their own, which may hang or fail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_slm.runtime.addresses import resolve_host
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import write_text
from megatron_slm.runtime.health.ending import EXIT_CODE
from megatron_slm.runtime.launch import LOOPBACK, NODE_LISTS, Launch, expand_hosts, read_launch
from megatron_slm.runtime.node_check.agent import connect, serve
from megatron_slm.runtime.node_check.coordinator import Coordinator, Result
from megatron_slm.runtime.node_check.report import Requirements
from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.reporting import run_tool

NUMBERS = {  # fields of Requirements, with their help
    "save_gb": "free space of --save on each node in GB",
    "tmp_gb": "free space for temporary files on each node in GB",
    "memory_gb": "available host memory of each node in GB",
    "device_memory": "free share of the memory of each GPU",
    "clock_skew": "largest difference of a node's clock from the median, in seconds",
    "relative_rate": "smallest share of the median rate of all nodes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return 0 if enough nodes are healthy, 4 otherwise, 2 for a user error."""
    outcome: list[int] = []
    code = run_tool(lambda: outcome.append(_run(parse(argv))))
    return code or outcome[0]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-slm-check-nodes",
        description="Check the nodes of a job: devices, communication, disks, memory, clocks and versions. Start one "
        "process per node with srun.",
    )
    parser.add_argument("--save", help="directory of the checkpoints, which must be writable [not checked]")
    parser.add_argument("--run-dir", help="directory that all nodes must share [the one of --save]")
    parser.add_argument("--gpus", type=int, help="number of GPUs per node [the most common number]")
    parser.add_argument("--needed", type=int, metavar="N", help="number of healthy nodes that are needed [all]")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for each part of the check [120]")
    parser.add_argument("--output", help="JSON file for the result with all measurements")
    parser.add_argument("--unhealthy-nodes", metavar="FILE", help="file for the names of unhealthy nodes, one a line")
    parser.add_argument(
        "--healthy-nodes",
        metavar="FILE",
        help="file for the names of the needed healthy nodes, one a line, for srun --nodelist; removed if there are "
        "too few",
    )
    for name, text in NUMBERS.items():
        default = getattr(Requirements, name)
        flag = f"--{'max' if name == 'clock_skew' else 'min'}-{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, type=float, default=default, help=f"{text} [{default:g}]")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    launch, nodes = read_launch(), job_nodes()
    if not nodes and launch.world_size > 1:
        nodes = [task_name(rank) for rank in range(launch.world_size)]
    nodes = nodes or [task_name(0)]
    needed = len(nodes) if arguments.needed is None else arguments.needed
    if not 0 < needed <= len(nodes):
        raise ConfigError(f"--needed {needed} must be between 1 and the number of nodes, {len(nodes)}.")
    if launch.local_rank and os.environ.get("SLURMD_NODENAME"):
        return 0  # one process per node is enough
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    node = os.environ.get("SLURMD_NODENAME") or task_name(launch.rank)
    candidates = coordinator_addresses(launch, nodes)
    results: list[Result] = []
    coordinating = None
    if node in nodes[: len(candidates)]:
        coordinating = _Candidate(nodes.index(node), candidates, nodes, arguments, signals, results)
        coordinating.start()
    connection = connect(candidates, arguments.time_limit)
    if connection is None:
        raise ConfigError(
            f"{node} cannot reach the node check at {' or '.join(f'{host}:{port}' for host, port in candidates)}. "
            "Start one process per node with srun, and check the network."
        )
    has_ended = serve(connection, node, arguments.save, arguments.time_limit)
    if coordinating is None or not coordinating.has_served:
        return 0 if has_ended else 1
    coordinating.join()
    if not results:
        return 1  # the thread has printed its error
    return _publish(results[0], needed, arguments)


class _Candidate(threading.Thread):
    """Run the coordinator in a process that may have to: on the second node, only if the first does not answer."""

    def __init__(
        self,
        index: int,
        candidates: Sequence[tuple[str, int]],
        nodes: list[str],
        arguments: argparse.Namespace,
        signals: list[int],
        results: list[Result],
    ) -> None:
        super().__init__(daemon=True)
        self.index, self.candidates, self.nodes, self.arguments = index, candidates, nodes, arguments
        self.signals, self.results = signals, results
        self.has_served = index == 0 and not any(connects(other, 0.1) for other in candidates[1:])  # if this is late
        self.server = listen(candidates[0][1]) if self.has_served else None

    def run(self) -> None:
        server = self.server
        if server is None:
            if self.index == 0 or connects(self.candidates[0], self.arguments.time_limit / 2):
                return
            self.has_served = True
            server = listen(self.candidates[self.index][1])
        arguments = self.arguments
        needs = Requirements(gpus=arguments.gpus, **{name: getattr(arguments, name) for name in NUMBERS})
        shared = arguments.run_dir or arguments.save
        coordinator = Coordinator(
            server,
            self.nodes,
            needs,
            shared=Path(shared) if shared else None,
            limit=arguments.time_limit,
            node=self.nodes[self.index],
            address=self.candidates[self.index][0],
            hurries=lambda: bool(self.signals),
        )
        self.results.append(coordinator.run())


def listen(port: int) -> socket.socket:
    """Return the server of the coordinator."""
    try:
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise ConfigError(
            f"the node check cannot listen on port {port} ({error.strerror}). Set MASTER_PORT to a free port."
        ) from error


def connects(address: tuple[str, int], seconds: float) -> bool:
    """Return whether a server answers within ``seconds``."""
    connection = connect([address], seconds)
    if connection is not None:
        connection.close()
    return connection is not None


def job_nodes() -> list[str]:
    """Return the nodes of the Slurm step or job; an empty list without Slurm."""
    names = [os.environ[name] for name in NODE_LISTS if os.environ.get(name)]
    return expand_hosts(names[0]) if names else []


def task_name(rank: int) -> str:
    """Return the name of a node without Slurm."""
    return f"task {rank}"


def coordinator_addresses(launch: Launch, nodes: Sequence[str]) -> list[tuple[str, int]]:
    """Return the addresses of the coordinator: on the first node, or on the second if the first does not answer."""
    if launch.address is None or launch.port is None:
        with socket.create_server((LOOPBACK, 0)) as server:
            return [(LOOPBACK, int(server.getsockname()[1]))]
    addresses = [(resolve_host(launch.address), launch.port)]
    if launch.launcher == "srun" and len(nodes) > 1:
        addresses.append((resolve_host(nodes[1]), launch.port + 1))
    return addresses


def _publish(result: Result, needed: int, arguments: argparse.Namespace) -> int:
    """Print the unhealthy nodes, write the files, and return the exit code."""
    for node, reasons in result.problems.items():
        for reason in reasons:
            print_error(f"unhealthy node {node}: {reason}")
    healthy, is_enough = result.healthy, len(result.healthy) >= needed
    print_error(
        f"node check: {len(healthy)} of {len(result.nodes)} nodes are healthy, and {needed} are needed"
        + ("" if is_enough else ". Exclude the unhealthy nodes with sbatch --exclude, or requeue the job.")
    )
    if arguments.output is not None:
        content = {
            "time": time.time(),
            "healthy": healthy,
            "unhealthy": result.problems,
            "needed": needed,
            "reports": [asdict(report) for report in result.reports],
        }
        write_text(arguments.output, json.dumps(content, indent=2) + "\n", "--output")
    if arguments.unhealthy_nodes is not None:
        write_text(arguments.unhealthy_nodes, "".join(f"{node}\n" for node in result.problems), "--unhealthy-nodes")
    if arguments.healthy_nodes is not None:
        if is_enough:
            write_text(arguments.healthy_nodes, "".join(f"{node}\n" for node in healthy[:needed]), "--healthy-nodes")
        else:
            Path(arguments.healthy_nodes).unlink(missing_ok=True)
    _end_step(result)
    return 0 if is_enough else EXIT_CODE


def _end_step(result: Result) -> None:
    """Kill the processes of the srun step that have not connected, for which srun would wait."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step and len(result.reports) < len(result.nodes):
        with contextlib.suppress(OSError):  # in a container without Slurm's commands
            subprocess.run(["scancel", "--signal=KILL", f"{job}.{step}"], check=False)


if __name__ == "__main__":
    sys.exit(main())
