"""State of each rank as its messages describe it, and the report on dead and hung ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_slm.runtime.health.stacks import Stack

MAX_NAMED = 4  # ranks described in full in a report


@dataclass(frozen=True)
class Identity:
    """Identify the process of a rank."""

    rank: int
    host: str
    pid: int
    started: float  # start time of the process, since pids are reused
    stage: int = 0  # pipeline stage; ranks of a stage have equal work

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


@dataclass(frozen=True)
class Beat:
    """Represent the regular message of a rank: the state of its main thread."""

    phase: str
    step: int
    transitions: int
    idle: float  # seconds since the last sign of life of the main thread
    limit: float | None  # of ``idle``; None in a slow phase
    waiting: float  # seconds for which the main thread has waited at one place for other ranks or the device
    steps: int
    seconds_loading: float
    seconds_forward: float

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass(frozen=True)
class Witness:
    """Represent a living rank at the time of a hang."""

    identity: Identity
    beat: Beat
    stack: Stack | None  # None if the rank did not answer


Loss = tuple[Identity, Beat | None, float]  # rank, its last message, and the seconds since then


def describe_dead(dead: Sequence[Loss]) -> str:
    """Return the message about ranks whose processes ended without a message."""
    lines = [
        f"{identity} died without a message. It was killed, for example by the kernel for lack of memory (see dmesg on "
        f"{identity.host}), or its node failed.{_last_message(beat, seconds)}"
        for identity, beat, seconds in dead[:MAX_NAMED]
    ]
    return _with_rest(lines, [identity for identity, *_ in dead])


def describe_silent(silent: Sequence[Loss]) -> str:
    """Return the message about ranks that send no messages any more."""
    lines = [
        f"{identity} has not responded for {seconds:.0f} s. It is stopped, blocked outside of Python, or its node or "
        f"network failed.{_last_message(beat, seconds)}"
        for identity, beat, seconds in silent[:MAX_NAMED]
    ]
    return _with_rest(lines, [identity for identity, *_ in silent])


def _last_message(beat: Beat | None, seconds: float) -> str:
    return "" if beat is None else f" Its last message, {seconds:.1f} s before: {beat.place}."


def describe_hang(witnesses: Sequence[Witness]) -> str:
    """Return the message about a run without progress: the suspected ranks with their stacks, then the others."""
    suspects = find_suspects(witnesses)
    others = [witness for witness in witnesses if witness not in suspects]
    idle = max(witness.beat.idle for witness in witnesses)
    lines = []
    for witness in suspects[:MAX_NAMED]:
        lines.append(f"{witness.identity} hangs: no progress for {witness.beat.idle:.0f} s in {witness.beat.place}.")
        if witness.stack is not None and witness.stack.text:
            lines.append(f"Its Python stack:\n{witness.stack.text}")
    text = _with_rest(lines, [witness.identity for witness in suspects])
    if not suspects:
        text = (
            f"no rank has made progress for {idle:.0f} s, and all wait for other ranks or for the device. A device or "
            "the network may be faulty."
        )
    return "\n".join([text, *_places(others, "the other ranks" if suspects else "the ranks")])


def find_suspects(witnesses: Sequence[Witness]) -> list[Witness]:
    """Return the ranks that most probably cause a hang; none if all look the same.

    In this order: ranks that are behind the others, ranks that do not wait for others, the smallest group of ranks
    at one place.
    """
    behind = min(witness.beat.transitions for witness in witnesses)
    late = [witness for witness in witnesses if witness.beat.transitions == behind]
    working = [witness for witness in late if witness.stack is None or not witness.stack.is_waiting]
    if working and len(working) < len(witnesses):
        return working
    if len(late) < len(witnesses):
        return late
    groups = _by_place(witnesses)
    smallest = min(groups.values(), key=len)
    return smallest if 2 * len(smallest) < len(witnesses) else []


def _by_place(witnesses: Iterable[Witness]) -> dict[str, list[Witness]]:
    groups: dict[str, list[Witness]] = defaultdict(list)
    for witness in witnesses:
        at = "" if witness.stack is None else f", at {witness.stack.place}"
        groups[f"{witness.beat.place}{at}"].append(witness)
    return groups


def _places(witnesses: Sequence[Witness], title: str) -> list[str]:
    groups = _by_place(witnesses)
    found = [f"  {format_ranks(each.identity.rank for each in group)}: {place}" for place, group in groups.items()]
    return [f"{title}:", *found] if found else []


def _with_rest(lines: list[str], identities: Sequence[Identity]) -> str:
    rest = identities[MAX_NAMED:]
    if rest:
        hosts = ", ".join(dict.fromkeys(identity.host for identity in rest))
        lines = [*lines, f"So did {format_ranks(identity.rank for identity in rest)} on {hosts}."]
    return "\n".join(lines)


def format_ranks(ranks: Iterable[int]) -> str:
    """Format rank numbers with ranges, such as "rank 3" or "ranks 0-2, 5"."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ordered) > 1 else ''} {text}"
