"""Heartbeats for ft_launcher of nvidia-resiliency-ext, which restarts the ranks of a job within its allocation."""

from __future__ import annotations

import os
import time
from typing import Any

from megatron_slm.runtime.console import warn

SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # variable that ft_launcher sets
SECONDS_BETWEEN_HEARTBEATS = 10.0


class Heartbeat:
    """Send heartbeats to the rank monitor of ft_launcher, if it has started this process."""

    def __init__(self) -> None:
        self._client = _connect() if os.environ.get(SOCKET) else None
        self._sent = 0.0

    def send(self) -> None:
        """Send a heartbeat, unless the last one is recent. A failure is reported once, and the run continues."""
        now = time.monotonic()
        if self._client is None or now - self._sent < SECONDS_BETWEEN_HEARTBEATS:
            return
        self._sent = now
        try:
            self._client.send_heartbeat()
        except Exception as error:  # of the package, which raises several kinds
            warn(f"ft_launcher receives no more heartbeats ({error}).")
            self._client = None

    def close(self) -> None:
        """End the monitoring of this process."""
        client, self._client = self._client, None
        if client is not None:
            client.shutdown_workload_monitoring()


def _connect() -> Any:
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        client = RankMonitorClient()
        client.init_workload_monitoring()
    except Exception as error:  # of an import, or of the package
        warn(f"started by ft_launcher, to which no heartbeats can be sent ({error}). Install megatron_slm[resiliency].")
        return None
    return client
