"""Test heartbeats for ft_launcher: against its rank monitor if the package is installed, else against a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest

from megatron_slm.runtime import resiliency
from megatron_slm.runtime.resiliency import Heartbeat


def stand_in(client: mock.Mock) -> dict[str, ModuleType]:
    module = SimpleNamespace(RankMonitorClient=lambda: client)
    names = ("nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance")
    return dict.fromkeys(names, module)  # type: ignore[arg-type]


def test_no_heartbeats_without_ft_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(resiliency.SOCKET, raising=False)
    client = mock.Mock()
    with mock.patch.dict(sys.modules, stand_in(client)):
        Heartbeat().send()
    assert client.mock_calls == []


def test_heartbeats_under_ft_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(resiliency.SOCKET, "/tmp/socket")
    client = mock.Mock()
    with mock.patch.dict(sys.modules, stand_in(client)):
        heartbeat = Heartbeat()
        heartbeat.send()
        heartbeat.send()  # too soon
        assert client.send_heartbeat.call_count == 1
        monkeypatch.setattr(resiliency, "SECONDS_BETWEEN_HEARTBEATS", 0.0)
        client.send_heartbeat.side_effect = RuntimeError("gone")
        for _ in range(3):
            heartbeat.send()
        heartbeat.close()
    assert client.send_heartbeat.call_count == 2
    assert capsys.readouterr().err.count("ft_launcher receives no more heartbeats (gone)") == 1


def test_missing_package_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(resiliency.SOCKET, "/tmp/socket")
    with mock.patch.dict(sys.modules, {"nvidia_resiliency_ext.fault_tolerance": None}):
        Heartbeat().send()
    assert "Install megatron_slm[resiliency]" in capsys.readouterr().err
