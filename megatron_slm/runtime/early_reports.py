"""Error reports before the process group exists: one message if all ranks have the same error, else one per error.

Without torchrun, rank 0 announces its message at the rendezvous address, where the other ranks ask for it. A rank 0
that waits for the others there has no error, and its rendezvous does not answer. torchrun ends all ranks of a node when
one has failed, so that the ranks that live a while longer have an error that the first did not have.
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

SECONDS_TO_ANNOUNCE = 5.0  # for ranks that start later than rank 0
SECONDS_TO_ASK = 10.0  # for a rank 0 that starts later
SECONDS_TO_ANSWER = 1.0
SECONDS_BETWEEN_TRIES = 0.1
SECONDS_FOR_OTHERS = 1.0  # to find their error, before torchrun ends them
SECONDS_TO_BE_ENDED = 3.0  # by torchrun, if another rank of the node has failed before torch was imported
SECONDS_TO_BE_LISTED = 15.0  # by torchrun, after a rank that has printed its message; it may take long to exit
SECONDS_BETWEEN_RANKS = 0.5  # of a node under torchrun


def is_under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def announce(launch: Launch, message: str) -> None:
    """Answer the other ranks with the message of rank 0, until all have asked or a few seconds have passed."""
    if is_under_torchrun():
        time.sleep(SECONDS_FOR_OTHERS)
        return
    if launch.port is None:
        return
    others, end = launch.world_size - 1, time.monotonic() + SECONDS_TO_ANNOUNCE
    with contextlib.suppress(OSError), socket.create_server(("", launch.port)) as server:
        while others and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            connection, _ = server.accept()
            with connection:
                connection.sendall(_digest(message))
            others -= 1


def is_reported(launch: Launch, message: str) -> bool:
    """Return whether another rank reports the error of this rank, which is not rank 0."""
    if is_under_torchrun():
        _wait_to_be_ended(launch, SECONDS_TO_BE_ENDED)
        return not _connects(launch)  # the agent of rank 0 serves the address until a rank of its node fails
    return launch.port is not None and _ask(launch) == _digest(message)


def leave_quietly(launch: Launch) -> None:
    """Let the rank that has reported end first, under torchrun, which lists every rank that failed before it acts."""
    if is_under_torchrun():
        _wait_to_be_ended(launch, SECONDS_TO_BE_LISTED)


def _wait_to_be_ended(launch: Launch, seconds: float) -> None:
    """Wait for a signal from torchrun, in the order of local ranks, and exit with code 0 when it comes.

    torchrun has the code of the rank that failed first, and would list any other one that is not 0.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(seconds + SECONDS_BETWEEN_RANKS * launch.local_rank)


def _ask(launch: Launch) -> bytes:
    """Return the answer of rank 0; empty if it has no error or cannot be reached."""
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
