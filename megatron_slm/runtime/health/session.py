"""Health of this run: start and end of monitoring, and access from the trainer."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from megatron_slm.runtime.errors import OF_COMMUNICATION
from megatron_slm.runtime.health.channel import Channel
from megatron_slm.runtime.health.ending import EXIT_CODE, end_process, kill_on_this_host
from megatron_slm.runtime.health.member import MemberThread
from megatron_slm.runtime.health.monitor import Limits, Monitor, Verdict
from megatron_slm.runtime.health.progress import ENDING, progress, reset_progress
from megatron_slm.runtime.health.ranks import Identity
from megatron_slm.runtime.health.stragglers import Straggler, StragglerTable
from megatron_slm.runtime.launch import Launch
from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.start_times import start_time

KEY = "health"
SECONDS_TO_CONNECT = 10.0
SECONDS_FOR_VERDICT = 4.0
SHARE_OF_TIMEOUT = 0.9  # of the timeout of collectives, after which the waiting ranks would fail


class Store(Protocol):
    """Interface of torch's key-value stores used at the start."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


@dataclass
class _Session:
    member: MemberThread | None
    monitor: Monitor | None  # on rank 0
    table: StragglerTable
    has_waited: bool = False  # for a verdict


_session: _Session | None = None


def start_health(store: Store, launch: Launch, *, hang_timeout: float, collective_timeout: float, stage: int) -> None:
    """Monitor this rank, and all ranks on rank 0. Every rank has to call it.

    Args:
        hang_timeout: seconds without progress in a training step that are a hang; 0 disables the detection of hangs.
        collective_timeout: seconds after which a collective fails.
        stage: pipeline stage of this rank.
    """
    global _session
    reset_progress()
    if not faulthandler.is_enabled() and _has_descriptor():
        faulthandler.enable()  # prints the Python stack of a process that crashes
    infinite = float("inf")
    limits = Limits(hang_timeout or infinite, SHARE_OF_TIMEOUT * collective_timeout if hang_timeout else infinite)
    identity = this_identity(launch.rank, stage)
    monitor = None
    if launch.rank == 0:
        monitor = Monitor(launch.world_size, limits, lambda verdict: _end(verdict, identity))
        address = {"hosts": _addresses(launch), "port": monitor.port, "token": monitor.token}
        store.set(KEY, json.dumps({**address, "first": asdict(identity)}))
    published = json.loads(store.get(KEY))
    connection = _connect(published["hosts"], published["port"])
    member = None
    if connection is None:
        print_error(
            f"warning: rank {launch.rank} on {identity.host} cannot reach port {published['port']} of rank 0 "
            f"({', '.join(published['hosts'])}), so that its death or hang is found only by the timeout of "
            "collectives. Allow connections between the nodes."
        )
    else:
        member = MemberThread(
            Channel(connection),
            identity,
            Identity(**published["first"]),
            token=published["token"],
            limits=limits,
            world_size=launch.world_size,
            progress=progress,
            is_reporter=launch.rank == 1 or launch.local_rank == 0,
        )
    _session = _Session(member, monitor, StragglerTable())


def this_identity(rank: int, stage: int) -> Identity:
    """Return the identity of this process."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Identity(rank, host, os.getpid(), start_time(os.getpid()), stage)


def announce_end(code: int) -> None:
    """Announce the end of this process with an exit code, before its process groups are destroyed."""
    if _session is not None:
        progress.enter(ENDING, slow=True)
        if _session.member is not None:
            _session.member.say_goodbye(code)


def stop_health() -> None:
    """Stop monitoring, after the process groups are destroyed."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    if session.member is not None:
        session.member.close()
    if session.monitor is not None:
        session.monitor.close()


@contextmanager
def verdict_first() -> Iterator[None]:
    """If the block fails because another rank has died, let the verdict on that rank end this process first."""
    try:
        yield
    except Exception as error:
        if any(phrase in str(error) for phrase in OF_COMMUNICATION):
            _await_verdict()
        raise


def _await_verdict() -> None:
    """Wait for a verdict, which ends this process; return if another rank has reported a failure."""
    session, end = _session, time.monotonic() + SECONDS_FOR_VERDICT
    if session is None or session.member is None or session.has_waited:
        return
    session.has_waited = True
    while not session.member.has_failed_peer and time.monotonic() < end:
        time.sleep(0.02)


def find_stragglers() -> list[Straggler] | None:
    """Return the slow ranks since the last call, the slowest first, on rank 0; None before enough steps."""
    if _session is None or _session.monitor is None:
        return None
    with _session.monitor.lock:
        members = list(_session.monitor.roll.members.values())
    return _session.table.update([(member.identity, member.beat) for member in members if member.beat is not None])


def _end(verdict: Verdict, identity: Identity) -> None:
    for other in verdict.kill:
        if other.rank != 0:
            kill_on_this_host(other, identity.host)
    end_process(EXIT_CODE, verdict.message, prints=True)


def _addresses(launch: Launch) -> list[str]:
    """Return addresses of this host for other ranks, the most probable first."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((launch.address, launch.port or 1))  # sends nothing, and chooses the network
        local = str(probe.getsockname()[0])
        if not local.startswith("127."):
            found.append(local)
    return [*dict.fromkeys([*found, launch.address or "127.0.0.1", socket.gethostname()])]


def _connect(hosts: list[str], port: int) -> socket.socket | None:
    for host in hosts:
        with contextlib.suppress(OSError):
            return socket.create_connection((host, port), SECONDS_TO_CONNECT / len(hosts))
    return None


def _has_descriptor() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True
