"""Agent on each node: runs the checks that the coordinator requests, within time limits, and reports."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_slm.runtime.health.channel import Channel, Message
from megatron_slm.runtime.node_check.local import check_locally

DEVICE_CHECK = (sys.executable, "-m", "megatron_slm.runtime.node_check.device")
SECONDS_BETWEEN_TRIES = 0.2


def connect(candidates: Sequence[tuple[str, int]], seconds: float) -> socket.socket | None:
    """Connect to the first candidate that answers within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for address in candidates:
            with contextlib.suppress(OSError):
                return socket.create_connection(address, 5.0)
        time.sleep(SECONDS_BETWEEN_TRIES)
    return None


def serve(connection: socket.socket, node: str, save: str | None, limit: float) -> bool:
    """Run the requested checks until the coordinator ends the check; return False if it dies before.

    Args:
        limit: seconds for each check.
    """
    poll = select.poll()
    with contextlib.closing(Channel(connection)) as channel:
        channel.send({"hello": node, "port": _free_port()})
        poll.register(channel, select.POLLIN)
        while channel.is_open:
            poll.poll()
            for message in channel.receive():
                if "done" in message:
                    return True
                channel.send(_answer(message, node, save, limit))
    return False


def _answer(message: Message, node: str, save: str | None, limit: float) -> Message:
    if "ping" in message:
        return {"pong": time.time()}
    if "check" in message:
        report = check_locally(node, save, message["check"])
        results, errors = run_processes([[*DEVICE_CHECK, "compute"]], limit)
        report.errors += errors
        for result in results:
            report.errors += result["errors"]
            report.gpus, report.rates = result["gpus"], result["rates"]
            report.device_memory = result["device_memory"]
        return {"report": asdict(report)}
    rank, size, address = message["pair"]
    per_node = size // 2
    ranks = range(rank * per_node, (rank + 1) * per_node)
    commands = [[*DEVICE_CHECK, "pair", str(each), str(size), *map(str, address)] for each in ranks]
    results, errors = run_processes(commands, limit)
    errors += [error for result in results for error in result["errors"]]
    return {"paired": {"errors": errors, "rate": min((result["rate"] for result in results), default=0.0)}}


def run_processes(commands: Sequence[Sequence[str]], limit: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Run processes at the same time; return their results, and errors of those that failed or exceeded the limit.

    A process that cannot be killed, for example within a driver, is left behind.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes: list[subprocess.Popen[str]] = []
    errors: list[str] = []
    results: list[dict[str, Any]] = []
    try:
        for command in commands:
            processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        end = time.monotonic() + limit
        for process in processes:
            try:
                output, shown = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                errors.append(f"the check of the devices did not end within {limit:.0f} s")
                continue
            if process.returncode == 0 and output.strip():
                results.append(json.loads(output.strip().splitlines()[-1]))
            else:
                reason = ([line for line in shown.strip().splitlines() if line.strip()] or ["no message"])[-1]
                errors.append(f"the check of the devices failed with exit code {process.returncode}: {reason.strip()}")
    except (OSError, ValueError) as error:
        errors.append(f"the check of the devices failed: {error}")
    finally:
        for process in processes:
            process.kill()
    return results, list(dict.fromkeys(errors))


def _free_port() -> int:
    """Return a port for an all-reduce of which this node is the first."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
