"""The port of a test's ranks is theirs alone."""

from __future__ import annotations

import errno
import socket

import pytest
from torch.distributed import TCPStore

from megatron_slm.testing.ranks import reserved_port


def test_a_reserved_port_serves_the_ranks_alone() -> None:
    with reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError) as error:
            other.bind(("127.0.0.1", port))
        assert error.value.errno == errno.EADDRINUSE
        TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
