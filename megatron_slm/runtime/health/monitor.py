"""Monitor on rank 0: receives the messages of all ranks, and ends the run after a dead or hung rank."""

from __future__ import annotations

import contextlib
import logging
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megatron_slm.runtime.health.channel import Channel, Message
from megatron_slm.runtime.health.ranks import (
    Beat,
    Identity,
    Witness,
    describe_dead,
    describe_hang,
    describe_silent,
)
from megatron_slm.runtime.health.stacks import Stack

SECONDS_BETWEEN_BEATS = 2.0
BEATS_PER_SECOND = 500  # of all ranks at most, which cost less than one percent of a core
SECONDS_FOR_MORE = 0.5  # after the first dead rank, in which the other processes of its node end
SECONDS_FOR_STACKS = 3.0
SECONDS_PER_ROUND = 0.5
BACKLOG = 4096  # connections of ranks that start at the same time
SUSPENDED = 5.0  # seconds without a round of this thread in which the process was suspended


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Seconds after which a rank counts as hung; infinite to disable."""

    hang: float  # without progress of the main thread in a training step
    slow: float  # without a message in start-up, save or compilation, or within one collective there

    def interval(self, world_size: int) -> float:
        """Return the seconds between two messages of a rank."""
        return min(max(SECONDS_BETWEEN_BEATS, world_size / BEATS_PER_SECOND), self.hang / 5)

    @property
    def suspended(self) -> float:
        """Return the seconds without a round of a thread after which its process counts as suspended."""
        return min(SUSPENDED, self.hang / 2)


class Verdict(NamedTuple):
    """Message about the ranks that end a run, and those that cannot end by themselves."""

    message: str
    kill: list[Identity]


@dataclass
class Member:
    """State of a connected rank."""

    identity: Identity
    channel: Channel
    heard: float
    beat: Beat | None = None
    stack: Stack | None = None
    lost: float | None = None  # time of a disconnection without a goodbye
    has_ended: bool = False

    @property
    def is_active(self) -> bool:
        return not self.has_ended and self.lost is None


class Roll:
    """Table of the ranks; decides on the health of the run."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.members: dict[int, Member] = {}
        self.asked: float | None = None  # time of the request for stacks, if one is open

    def forgive(self, seconds: float) -> None:
        """Do not count ``seconds`` in which this process was suspended."""
        for member in self.members.values():
            member.heard += seconds

    def is_stuck(self, now: float) -> bool:
        """Return whether a rank makes no progress, and does not wait for one in a slow phase, such as a save."""
        active = self._active()
        has_busy = any(self._is_busy(member, now) for member in active)
        return any(
            self._is_stuck(member, now) and not (has_busy and self._may_wait(member.beat))
            for member in active
            if member.beat is not None
        )

    def verdict(self, now: float) -> Verdict | None:
        """Return the verdict on dead and silent ranks, or None."""
        lost = [member for member in self.members.values() if member.lost is not None]
        if lost and now - min(member.lost or 0.0 for member in lost) >= SECONDS_FOR_MORE:
            losses = [(member.identity, member.beat, (member.lost or now) - member.heard) for member in lost]
            return Verdict(describe_dead(losses), [])
        silent = [member for member in self._active() if now - member.heard > self._allowed_silence(member)]
        return self._silent(silent, now) if silent and self.asked is None else None

    def verdict_on_hang(self, now: float) -> Verdict | None:
        """Return the verdict after a request for stacks; None if the run makes progress again."""
        active = self._active()
        silent = [member for member in active if member.stack is None]
        if silent and len(silent) < len(active):
            return self._silent(silent, now)
        if not self.is_stuck(now):
            return None
        witnesses = [Witness(each.identity, each.beat, each.stack) for each in active if each.beat is not None]
        return Verdict(describe_hang(witnesses), [])  # all end by themselves

    def _silent(self, silent: list[Member], now: float) -> Verdict:
        described = [(member.identity, member.beat, now - member.heard) for member in silent]
        return Verdict(describe_silent(described), [member.identity for member in silent])

    def _active(self) -> list[Member]:
        return [member for member in self.members.values() if member.is_active]

    def _is_busy(self, member: Member, now: float) -> bool:
        """Return whether a rank works in a phase that may be long."""
        beat = member.beat
        is_slow = beat is not None and beat.limit is None and not beat.waiting
        return is_slow and now - member.heard <= self.limits.hang

    def _may_wait(self, beat: Beat) -> bool:
        return 0 < beat.waiting <= self.limits.slow

    def _is_stuck(self, member: Member, now: float) -> bool:
        beat = member.beat
        if beat is None:
            return False
        if beat.limit is None:
            return beat.waiting > self.limits.slow
        return beat.idle + now - member.heard > beat.limit

    def _allowed_silence(self, member: Member) -> float:
        is_limited = member.beat is not None and member.beat.limit is not None
        return max(self.limits.hang, member.beat.limit or 0.0) if is_limited and member.beat else self.limits.slow


class Monitor:
    """Thread that serves the members of a run.

    Args:
        end: called once with the verdict, after it was sent to all ranks.
    """

    def __init__(self, world_size: int, limits: Limits, end: Callable[[Verdict], None]) -> None:
        self.roll = Roll(limits)
        self.token = secrets.token_hex(16)
        self._interval = limits.interval(world_size)
        self._end = end
        _allow_files(world_size)
        self._server = _listen()
        self.port = int(self._server.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._wake, woken = socket.socketpair()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._selector.register(woken, selectors.EVENT_READ)
        self._woken = woken
        self._closing = False
        self._pulsed = 0.0
        self._by_channel: dict[Channel, Member] = {}
        self.lock = threading.Lock()  # of the roll
        self._thread = threading.Thread(target=self._run, name="health-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell the members that the run ends, and stop."""
        self._closing = True
        self._wake.send(b".")
        self._thread.join()
        self._server.close()
        self._wake.close()
        self._woken.close()
        self._selector.close()

    def _run(self) -> None:
        """Serve; after an unexpected error, the run continues without a monitor."""
        try:
            self._serve()
        except Exception:
            logger.exception("the monitor of the ranks ended by an error")
            self._broadcast({"closing": True})

    def _serve(self) -> None:
        before = time.monotonic()
        while not self._closing:
            ready = self._selector.select(min(SECONDS_PER_ROUND, self._interval / 2))
            now = time.monotonic()
            with self.lock:
                if now - before > self.roll.limits.suspended:
                    self.roll.forgive(now - before)
                before = now
                for key, _ in ready:
                    self._handle(key, now)
                verdict = self._decide(now)
            if verdict is not None:
                self._broadcast({"end": verdict.message, "kill": [asdict(identity) for identity in verdict.kill]})
                self._end(verdict)
                return
            if now - self._pulsed > self._interval:
                self._pulsed = now
                self._broadcast({"pulse": True})
        for key, _ in self._selector.select(0):  # the goodbye of this rank
            self._handle(key, before)
        self._broadcast({"closing": True})
        for channel in self._by_channel:
            channel.close()

    def _decide(self, now: float) -> Verdict | None:
        roll = self.roll
        verdict = roll.verdict(now)
        if verdict is not None:
            return verdict
        if roll.asked is None:
            if roll.is_stuck(now):
                roll.asked = now
                for member in roll.members.values():
                    member.stack = None
                self._broadcast({"stack": True})
            return None
        has_answers = all(member.stack is not None for member in roll.members.values() if member.is_active)
        if has_answers or now - roll.asked > SECONDS_FOR_STACKS:
            verdict, roll.asked = roll.verdict_on_hang(now), None
        return verdict

    def _handle(self, key: selectors.SelectorKey, now: float) -> None:
        if key.fileobj is self._server:
            connection, _ = self._server.accept()
            self._selector.register(Channel(connection), selectors.EVENT_READ)
        elif isinstance(key.fileobj, Channel):
            channel: Channel = key.fileobj
            for message in channel.receive():
                self._accept(channel, message, now)
            if not channel.is_open:
                self._disconnect(channel, now)

    def _accept(self, channel: Channel, message: Message, now: float) -> None:
        member = self._by_channel.get(channel)
        if member is None:
            if not secrets.compare_digest(str(message.get("token")), self.token):
                channel.is_open = False
                return
            identity = Identity(**message["hello"])
            self.roll.members[identity.rank] = self._by_channel[channel] = Member(identity, channel, now)
            return
        member.heard = now
        if "beat" in message:
            member.beat = Beat(**message["beat"])
        if "stack" in message:
            member.stack = Stack(**message["stack"])
        if "bye" in message:
            member.has_ended = True
            if message["bye"]:
                self._broadcast({"failed": message["bye"]})

    def _disconnect(self, channel: Channel, now: float) -> None:
        self._selector.unregister(channel)
        channel.close()
        member = self._by_channel.get(channel)
        if member is not None and not member.has_ended:
            member.lost = now

    def _broadcast(self, message: Message) -> None:
        for member in self.roll.members.values():
            if member.channel.is_open:
                member.channel.send(message)


def _allow_files(world_size: int) -> None:
    """Raise the limit of open files, if the connections of all ranks need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * world_size + 1024:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen() -> socket.socket:
    """Return a server on a free port of all networks, of IPv6 too if the system has it."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", 0), backlog=BACKLOG)
