"""Error reports before the process group exists: one message per distinct error over all ranks.

Without torchrun, rank 0 serves its message at the rendezvous address, where the other ranks request it. If rank 0 has
no error, it waits for the others at this address and does not answer. torchrun terminates all ranks of a node when one
fails, so a rank that survives this has a different error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import time

from megatron_slm.runtime.addresses import resolve_host
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.launch import Launch

SECONDS_TO_ANNOUNCE = 5.0  # to ranks that start later than rank 0
SECONDS_TO_ASK = 10.0  # a rank 0 that starts later
SECONDS_TO_ANSWER = 1.0
SECONDS_BETWEEN_TRIES = 0.1
SECONDS_FOR_OTHERS = 1.0  # to detect their errors before torchrun terminates them
SECONDS_TO_TERMINATION = 3.0  # by torchrun, if another rank of the node failed before torch was imported
SECONDS_TO_SLOW_EXIT = 15.0  # of the rank that has printed its message, before which this rank must not fail
SECONDS_BETWEEN_RANKS = 0.5  # of a node under torchrun


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def announce(launch: Launch, message: str) -> None:
    """Serve the message of rank 0 until all other ranks have requested it or a timeout expires."""
    if is_under_torchrun():
        time.sleep(SECONDS_FOR_OTHERS)
        return
    if launch.port is None:
        return
    others, end = launch.world_size - 1, time.monotonic() + SECONDS_TO_ANNOUNCE
    with contextlib.suppress(OSError), socket.create_server(("", launch.port)) as server:
        while others and (remaining := end - time.monotonic()) > 0:
            server.settimeout(remaining)
            connection, _ = server.accept()
            with connection:
                connection.sendall(_digest(message))
            others -= 1


def is_reported(launch: Launch, message: str) -> bool:
    """Return whether another rank reports the error of this rank; for ranks other than 0."""
    if is_under_torchrun():
        _wait_for_termination(launch, SECONDS_TO_TERMINATION)
        return not _connects(launch)  # the agent of rank 0 serves the address until a rank of its node fails
    return launch.port is not None and _request_digest(launch) == _digest(message)


def leave_quietly(launch: Launch) -> None:
    """Under torchrun, let the reporting rank exit first, since torchrun lists every rank that fails by then."""
    if is_under_torchrun():
        _wait_for_termination(launch, SECONDS_TO_SLOW_EXIT)


def _wait_for_termination(launch: Launch, seconds: float) -> None:
    """Wait for torchrun's SIGTERM, staggered by local rank, and exit with code 0 on arrival.

    torchrun already has the exit code of the first failed rank and would list any other nonzero one.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(seconds + SECONDS_BETWEEN_RANKS * launch.local_rank)


def _request_digest(launch: Launch) -> bytes:
    """Return the message digest of rank 0; empty if rank 0 has no error or is unreachable."""
    assert launch.address is not None
    end, address = time.monotonic() + SECONDS_TO_ASK, launch.address
    with contextlib.suppress(ConfigError):
        address = resolve_host(address)
    while time.monotonic() < end:
        try:
            connection = socket.create_connection((address, launch.port), SECONDS_TO_ANSWER)
        except OSError:
            time.sleep(SECONDS_BETWEEN_TRIES)
            continue
        with connection, contextlib.suppress(OSError):
            return connection.recv(hashlib.sha256().digest_size)
        return b""
    return b""


def _connects(launch: Launch) -> bool:
    try:
        socket.create_connection((launch.address, launch.port), SECONDS_TO_ANSWER).close()
    except OSError:
        return False
    return True


def _digest(message: str) -> bytes:
    return hashlib.sha256(message.encode()).digest()
