"""Resolution of the host of rank 0."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_slm.runtime.addresses import resolve_host
from megatron_slm.runtime.errors import ConfigError

SCONTROL = '#!/bin/sh\n[ "$4" = node7 ] && echo "NodeName=node7 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=node7"\n'


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the system resolver fail for every name."""

    def fail(*arguments: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_known_host_is_left_as_it_is() -> None:
    assert resolve_host("127.0.0.1") == "127.0.0.1"


def test_node_that_only_slurm_knows_has_its_address(
    tmp_path: Path, unknown: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert resolve_host("node7") == "10.0.0.7"
    with pytest.raises(ConfigError, match=r"the host of rank 0, node8, has no address on .* Set MASTER_ADDR"):
        resolve_host("node8")


def test_unknown_host_is_refused_without_slurm(tmp_path: Path, unknown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="has no address"):
        resolve_host("typo")
