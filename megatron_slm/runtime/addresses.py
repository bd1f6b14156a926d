"""Resolve host names, through the system resolver or Slurm's node records."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess

from megatron_slm.runtime.errors import ConfigError

SECONDS_FOR_SLURM = 10.0


def resolve_host(host: str) -> str:
    """Return ``host`` if the system can resolve it, else the address of the Slurm node with that name.

    Raises:
        ConfigError: the host is unknown.
    """
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        address = _address_in_slurm(host)
        if address is None and error.errno == socket.EAI_NONAME:
            raise ConfigError(
                f"the host of rank 0, {host}, has no address on {socket.gethostname()} ({error.strerror}). Set "
                "MASTER_ADDR to a name or address of rank 0's host that all nodes can reach."
            ) from error
        return address or host
    return host


def _address_in_slurm(node: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "--oneliner", "show", "node", node]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_SLURM, check=True).stdout
        match = re.search(r"\bNodeAddr=(\S+)", shown)
        return match.group(1) if match is not None else None
    return None
