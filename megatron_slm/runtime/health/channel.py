"""Messages between a rank and the monitor: one JSON object per line over TCP."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

RECEIVED_BYTES = 65_536
LONGEST_MESSAGE = 1 << 20  # bytes; a longer line is not from a rank

Message = dict[str, Any]


class Channel:
    """Non-blocking connection. A message that cannot be sent is lost, and the connection counts as closed."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.is_open = True
        self._received = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Message) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            if self.connection.send(data) != len(data):
                self.is_open = False
        except BlockingIOError:  # a stopped process, which does not read
            pass
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """Return the complete messages that have arrived; clears ``is_open`` at the end of the connection."""
        try:
            data = self.connection.recv(RECEIVED_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        self.is_open = self.is_open and bool(data) and len(self._received) < LONGEST_MESSAGE
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):  # not from a rank
                self.is_open = False
                break
            messages.append(message)
        return messages

    def close(self) -> None:
        self.is_open = False
        self.connection.close()
