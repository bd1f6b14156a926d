"""Reports of the nodes, and the reasons for which a node fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

GIB = 2**30
NO_REPORT = "did not report within the time limit"


@dataclass(frozen=True)
class Requirements:
    """Minimum values of a healthy node."""

    gpus: int | None = None  # per node; None for the most common number
    save_gb: float = 10.0  # free space of --save
    tmp_gb: float = 1.0
    memory_gb: float = 1.0  # available host memory
    device_memory: float = 0.9  # free share of a GPU's memory
    clock_skew: float = 2.0  # seconds from the median clock
    relative_rate: float = 0.7  # share of the median rate of all nodes


@dataclass
class NodeReport:
    """Measurements of one node."""

    node: str
    errors: list[str] = field(default_factory=list)  # failed checks
    versions: dict[str, str] = field(default_factory=dict)
    free_gb: dict[str, float] = field(default_factory=dict)  # by role: save, tmp, memory
    clock_skew: float = 0.0  # seconds ahead of the coordinator
    clock_error: float = 0.0  # uncertainty of the clock skew in seconds
    gpus: int | None = None  # None without a device report
    device_memory: list[float] = field(default_factory=list)  # free share, by GPU
    rates: dict[str, list[float]] = field(default_factory=dict)  # by check, one for each GPU or pair of nodes

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> NodeReport:
        """Return the report of a message; unknown fields are ignored."""
        return NodeReport(**{name: message[name] for name in NodeReport.__dataclass_fields__ if name in message})


Pair = tuple[str, str]  # names of two nodes

UNITS = {"gemm": "TFLOP/s", "all-reduce in the node": "GB/s", "all-reduce between nodes": "GB/s"}


def find_problems(reports: Sequence[NodeReport], needs: Requirements) -> dict[str, list[str]]:
    """Return the reasons why nodes fail, by node; healthy nodes are absent."""
    problems = {report.node: [*report.errors, *_shortages(report, needs)] for report in reports}
    for findings in (_clocks(reports, needs), _gpu_counts(reports, needs), _versions(reports), _rates(reports, needs)):
        for node, reason in findings:
            problems[node].append(reason)
    return {node: reasons for node, reasons in problems.items() if reasons}


def _shortages(report: NodeReport, needs: Requirements) -> Iterator[str]:
    minimum = {"save": needs.save_gb, "tmp": needs.tmp_gb, "memory": needs.memory_gb}
    names = {"save": "--save has", "tmp": "the directory for temporary files has", "memory": "the host has"}
    for role, free in report.free_gb.items():
        if free < minimum[role]:
            thing = "memory" if role == "memory" else "space"
            yield f"{names[role]} {free:.1f} GB of free {thing}, and {minimum[role]:g} GB are needed"
    for index, share in enumerate(report.device_memory):
        if share < needs.device_memory:
            yield f"GPU {index} has only {share:.0%} of its memory free; another process uses it"


def _clocks(reports: Sequence[NodeReport], needs: Requirements) -> Iterator[tuple[str, str]]:
    middle = median(report.clock_skew for report in reports) if len(reports) > 2 else 0.0
    for report in reports:
        skew = report.clock_skew - middle
        if abs(skew) - report.clock_error > needs.clock_skew:
            yield report.node, f"the clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the other nodes"


def _gpu_counts(reports: Sequence[NodeReport], needs: Requirements) -> Iterator[tuple[str, str]]:
    known = [report for report in reports if report.gpus is not None]
    expected = needs.gpus if needs.gpus is not None else _most_common(report.gpus or 0 for report in known)
    for report in known:
        if report.gpus != expected:
            yield report.node, f"{report.gpus} GPUs are visible, and {expected} are expected"


def _versions(reports: Sequence[NodeReport]) -> Iterator[tuple[str, str]]:
    for name in sorted({name for report in reports for name in report.versions}):
        found = {report.node: report.versions[name] for report in reports if name in report.versions}
        usual = _most_common(found.values())
        for node, version in found.items():
            if version != usual:
                yield node, f"{name} is {version}, and {usual} on most nodes"


def _rates(reports: Sequence[NodeReport], needs: Requirements) -> Iterator[tuple[str, str]]:
    for name, unit in UNITS.items():
        rates = [rate for report in reports if report.gpus for rate in report.rates.get(name, [])]
        if not rates:
            continue
        middle = median(rates)
        for report in reports:
            own = report.rates.get(name, []) if report.gpus else []  # those of a CPU depend on its other load
            slow = [rate < needs.relative_rate * middle for rate in own]
            is_pair = name == "all-reduce between nodes"  # a slow peer makes one of them slow
            if slow and (all(slow) if is_pair else any(slow)):
                yield report.node, f"{name} runs at {min(own):.3g} {unit}, and at {middle:.3g} {unit} in the median"


def _most_common(values: Iterable[Any]) -> Any:
    counted = Counter(values)
    return counted.most_common(1)[0][0] if counted else None


def pair_rounds(nodes: Sequence[str]) -> list[list[Pair]]:
    """Return rounds of disjoint pairs, in which each node of a ring meets both neighbors."""
    count = len(nodes)
    if count < 2:
        return []
    if count == 2:
        return [[(nodes[0], nodes[1])]]
    ring = [(nodes[index], nodes[(index + 1) % count]) for index in range(count)]
    even, odd = ring[0 : count - count % 2 : 2], ring[1 : count - count % 2 : 2]
    return [even, odd, [ring[-1]]] if count % 2 else [even, odd]


def failing_pairs(failures: Mapping[Pair, str], rounds: Sequence[Sequence[Pair]]) -> dict[str, str]:
    """Return the nodes all of whose pairs failed, with the reason: the common node of failed pairs."""
    met: dict[str, list[Pair]] = {}
    for pair in (pair for each in rounds for pair in each):
        for node in pair:
            met.setdefault(node, []).append(pair)
    return {
        node: f"all-reduce with {_partners(node, pairs)} failed: {failures[pairs[0]]}"
        for node, pairs in met.items()
        if all(pair in failures for pair in pairs)
    }


def _partners(node: str, pairs: Sequence[Pair]) -> str:
    return ", ".join(sorted(other for pair in pairs for other in pair if other != node))
