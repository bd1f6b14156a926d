"""Coordinator of the check: requests the checks of all nodes, and decides on their health."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.runtime.health.channel import Channel, Message
from megatron_slm.runtime.node_check.report import (
    NO_REPORT,
    NodeReport,
    Requirements,
    failing_pairs,
    find_problems,
    pair_rounds,
)

SECONDS_IN_HURRY = 10.0  # for each stage after SIGTERM, which Slurm sends if another task has failed
SECONDS_OF_GRACE = 15.0  # beyond the limit of the agents, for their answers


@dataclass
class _Node:
    channel: Channel
    address: str
    port: int
    clock_skew: float = 0.0
    clock_error: float = 0.0


@dataclass
class Result:
    """Health of the nodes: all in the order of the job, and the reasons of the unhealthy ones."""

    nodes: list[str]
    problems: dict[str, list[str]]
    reports: list[NodeReport] = field(default_factory=list)

    @property
    def healthy(self) -> list[str]:
        return [node for node in self.nodes if node not in self.problems]


class Coordinator:
    """Server to which the agents of all nodes connect.

    Args:
        nodes: names of all nodes of the job.
        shared: directory that all nodes must share, or None.
        limit: seconds for the start of all agents, and for each check.
        node: name of the node that runs the coordinator.
        address: its address for other nodes.
        hurries: returns whether to end as soon as possible.
    """

    def __init__(
        self,
        server: socket.socket,
        nodes: Sequence[str],
        needs: Requirements,
        *,
        shared: Path | None,
        limit: float,
        node: str,
        address: str,
        hurries: Callable[[], bool] = lambda: False,
    ) -> None:
        self._server, self._names, self._needs = server, list(nodes), needs
        self._shared, self._limit, self._hurries = shared, limit, hurries
        self._node, self._address = node, address
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._nodes: dict[str, _Node] = {}
        self._answers: dict[str, Message] = {}
        self._problems: dict[str, list[str]] = {}

    def run(self) -> Result:
        """Check all nodes."""
        try:
            self._collect("hello", self._names, self._limit)
            for node in self._names:
                if node not in self._nodes:
                    self._problems[node] = [f"no process started there within {self._limit:.0f} s"]
            self._read_clocks()
            reports = self._check_nodes()
            healthy = [report.node for report in reports if not find_problems(reports, self._needs).get(report.node)]
            for node, reason in self._check_pairs(healthy, {report.node: report for report in reports}).items():
                self._problems.setdefault(node, []).append(reason)
            for node, reasons in find_problems(reports, self._needs).items():
                self._problems.setdefault(node, []).extend(reasons)
            return Result(self._names, self._problems, reports)
        finally:
            self._send(self._nodes, {"done": True})
            for member in self._nodes.values():
                member.channel.close()
            self._selector.close()
            self._server.close()

    def _read_clocks(self) -> None:
        """Compare the clock of each node with that of this one, without the time of the messages."""
        for name, node in list(self._nodes.items()):
            begin, before = time.time(), time.perf_counter()
            self._send([name], {"ping": True})
            answer = self._collect("pong", [name], SECONDS_IN_HURRY).get(name)
            if answer is not None:
                node.clock_error = (time.perf_counter() - before) / 2
                node.clock_skew = float(answer["pong"]) - begin - node.clock_error

    def _check_nodes(self) -> list[NodeReport]:
        names = [name for name in self._nodes if name not in self._problems]
        shared = self._write_shared()
        self._send(names, {"check": shared})
        answers = self._collect("report", names, self._limit + SECONDS_OF_GRACE)
        if shared is not None:
            with contextlib.suppress(OSError):
                Path(shared[0]).unlink()
        reports = []
        for name in names:
            if name in answers:
                report = NodeReport.from_message(answers[name]["report"])
                report.clock_skew, report.clock_error = self._nodes[name].clock_skew, self._nodes[name].clock_error
                reports.append(report)
            else:
                self._miss(name, NO_REPORT)
        return reports

    def _write_shared(self) -> tuple[str, str] | None:
        if self._shared is None:
            return None
        path, content = self._shared / f".node-check-{secrets.token_hex(4)}", secrets.token_hex(16)
        try:
            self._shared.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            self._problems.setdefault(self._node, []).append(f"{self._shared} cannot be written ({error.strerror})")
            return None
        return str(path), content

    def _check_pairs(self, healthy: Sequence[str], reports: Mapping[str, NodeReport]) -> dict[str, str]:
        """Run an all-reduce between pairs of nodes; return the nodes whose pairs all failed."""
        rounds, failures = pair_rounds(healthy), dict[tuple[str, str], str]()
        for pairs in rounds:
            for first, second in pairs:
                size = 2 * max(reports[first].gpus or 1, 1)
                address = (self._nodes[first].address, self._nodes[first].port)
                for rank, name in enumerate((first, second)):
                    self._send([name], {"pair": (rank, size, address)})
            answers = self._collect("paired", [name for pair in pairs for name in pair], self._limit + SECONDS_OF_GRACE)
            for pair in pairs:
                results: list[dict[str, Any]] = [answers[name]["paired"] for name in pair if name in answers]
                errors = [error for result in results for error in result["errors"]]
                if errors or len(results) < 2:
                    failures[pair] = errors[0] if errors else NO_REPORT
                for name, result in zip(pair, results, strict=False):
                    if not result["errors"]:
                        reports[name].rates.setdefault("all-reduce between nodes", []).append(result["rate"])
        return {} if self._hurries() else failing_pairs(failures, rounds)

    def _miss(self, name: str, reason: str) -> None:
        if not self._nodes[name].channel.is_open:
            reason = "its process ended during the check"
        elif self._hurries():
            return
        self._problems.setdefault(name, []).append(reason)

    def _send(self, names: Collection[str], message: Message) -> None:
        for name in names:
            if self._nodes[name].channel.is_open:
                self._nodes[name].channel.send(message)

    def _collect(self, kind: str, names: Collection[str], seconds: float) -> dict[str, Message]:
        """Return the next message of this kind of each node, as far as they arrive in time."""
        self._answers = {}
        end = time.monotonic() + seconds
        channels: dict[Channel, str] = {node.channel: name for name, node in self._nodes.items()}
        while any(self._is_expected(kind, name) for name in names) and (now := time.monotonic()) < end:
            if self._hurries():
                end = min(end, now + SECONDS_IN_HURRY)
            for key, _ in self._selector.select(min(0.2, end - now)):
                if key.fileobj is self._server:
                    connection, _ = self._server.accept()
                    self._selector.register(Channel(connection), selectors.EVENT_READ)
                elif isinstance(key.fileobj, Channel):
                    for message in key.fileobj.receive():
                        if "hello" in message:
                            channels[key.fileobj] = message["hello"]
                            self._meet(key.fileobj, message)
                        if kind in message and key.fileobj in channels:
                            self._answers[channels[key.fileobj]] = message
                    if not key.fileobj.is_open:
                        self._selector.unregister(key.fileobj)
        return self._answers

    def _is_expected(self, kind: str, name: str) -> bool:
        is_gone = name in self._nodes and not self._nodes[name].channel.is_open
        return name not in self._answers and not is_gone

    def _meet(self, channel: Channel, message: Message) -> None:
        name = message["hello"]
        if name in self._names and name not in self._nodes:
            address = self._address if name == self._node else str(channel.connection.getpeername()[0])
            self._nodes[name] = _Node(channel, address, int(message["port"]))
