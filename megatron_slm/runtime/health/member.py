"""Thread of a rank that sends its state to the monitor on rank 0, and ends the process on its verdict."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from dataclasses import asdict

from megatron_slm.runtime.health.channel import Channel, Message
from megatron_slm.runtime.health.ending import EXIT_CODE, end_process, kill_on_this_host
from megatron_slm.runtime.health.monitor import Limits
from megatron_slm.runtime.health.progress import Progress
from megatron_slm.runtime.health.ranks import Beat, Identity
from megatron_slm.runtime.health.stacks import main_stack

logger = logging.getLogger(__name__)

SECONDS_AFTER_FAILURE = 20.0  # of another rank, in which this rank may end by itself
IDLE = 10.0  # seconds without progress after which the stack is examined


class MemberThread:
    """Connection of this rank to the monitor.

    Args:
        channel: connection to the monitor.
        first: identity of rank 0.
        is_reporter: whether this rank reports the death of rank 0.
    """

    def __init__(
        self,
        channel: Channel,
        identity: Identity,
        first: Identity,
        *,
        token: str,
        limits: Limits,
        world_size: int,
        progress: Progress,
        is_reporter: bool,
    ) -> None:
        self._channel, self._identity, self._first = channel, identity, first
        self._limits, self._interval = limits, limits.interval(world_size)
        self._progress, self._is_reporter = progress, is_reporter
        self._beaten = self._heard = time.monotonic()
        self._waits_at, self._waiting_since = "", 0.0
        self._deadline: tuple[float, int] | None = None  # seconds of this process after a failure, and exit code
        self._is_unmonitored = False
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._send({"token": token, "hello": asdict(identity)})
        self._send({"beat": asdict(self._beat(self._beaten))})
        self._thread = threading.Thread(target=self._guard, name="health-member", daemon=True)
        self._thread.start()

    @property
    def has_failed_peer(self) -> bool:
        """Return whether another rank has ended with an error, which it has reported, or whether the run ends."""
        return self._deadline is not None or self._is_unmonitored

    def say_goodbye(self, code: int) -> None:
        """Announce the end of this process."""
        self._send({"bye": code})

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._channel.connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._channel.close()

    def _guard(self) -> None:
        """Run; after an unexpected error, this rank is not monitored."""
        try:
            self._run()
        except Exception:
            logger.exception("the thread that reports to the monitor ended by an error")
            self.say_goodbye(0)

    def _run(self) -> None:
        before, poll = time.monotonic(), select.poll()
        poll.register(self._channel, select.POLLIN)
        while not self._closed.is_set() and not self._is_unmonitored:
            readable = poll.poll(min(500.0, 500 * self._interval))
            now = time.monotonic()
            if now - before > self._limits.suspended:
                self._progress.forgive(now - before)
                self._heard += now - before
            before = now
            if readable:
                self._heard = now
                for message in self._channel.receive():
                    self._obey(message)
                if not (self._channel.is_open or self._closed.is_set() or self._is_unmonitored):
                    self._end_without_monitor(f"{self._first} died without a message, or its node failed.")
            if self._deadline is not None:
                break
            if now - self._beaten >= self._interval:
                self._beaten = now
                self._send({"beat": asdict(self._beat(now))})
            if now - self._heard > (self._progress.limit(self._limits.hang) or self._limits.slow):
                kill_on_this_host(self._first, self._identity.host)
                self._end_without_monitor(f"{self._first} has not responded for {now - self._heard:.0f} s.")
        if self._deadline is not None:
            seconds, code = self._deadline
            if not self._closed.wait(seconds):
                end_process(code, None, prints=False)

    def _obey(self, message: Message) -> None:
        if "stack" in message:
            stack = main_stack()
            self._send({"beat": asdict(self._beat(time.monotonic())), "stack": asdict(stack)})
        if "failed" in message and self._deadline is None:
            self._deadline = (SECONDS_AFTER_FAILURE, int(message["failed"]))
        if "closing" in message:
            self._is_unmonitored = True
        if "end" in message and self._identity.rank != 0:  # there, the monitor ends the process
            for fields in message["kill"]:
                kill_on_this_host(Identity(**fields), self._identity.host)
            end_process(EXIT_CODE, message["end"], prints=False)

    def _beat(self, now: float) -> Beat:
        progress = self._progress
        idle = max(0.0, now - progress.ticked)
        return Beat(
            phase=progress.phase,
            step=progress.step,
            transitions=progress.transitions,
            idle=idle,
            limit=progress.limit(self._limits.hang),
            waiting=self._waiting(now) if idle > min(IDLE, self._limits.hang / 4, self._limits.slow / 4) else 0.0,
            steps=progress.steps,
            seconds_loading=progress.seconds_loading,
            seconds_forward=progress.seconds_forward,
        )

    def _waiting(self, now: float) -> float:
        """Return the seconds for which the main thread has been seen waiting at one place."""
        stack = main_stack()
        place = f"{stack.place} {self._progress.transitions}" if stack.is_waiting else ""
        if place != self._waits_at:
            self._waits_at, self._waiting_since = place, now
        return now - self._waiting_since if place else 0.0

    def _end_without_monitor(self, message: str) -> None:
        end_process(EXIT_CODE, message, prints=self._is_reporter)

    def _send(self, message: Message) -> None:
        with self._sending:
            self._channel.send(message)
