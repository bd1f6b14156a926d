"""Torch's fused Adam on devices that have it, with the state that its kernel expects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_slm.mcore import optimizer as ours
from megatron_slm.training.implementations import _optimizer


def updated(devices: set[str], monkeypatch: pytest.MonkeyPatch, resumes: bool = False) -> tuple[torch.Tensor, Any]:
    """Return a parameter after three steps, and the part of Megatron-Core's optimizer that holds torch's."""
    monkeypatch.setattr(ours, "FUSED_DEVICES", devices)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 40))
    part: Any = object.__new__(ours.DistributedOptimizer)
    part.optimizer = torch.optim.AdamW([parameter], lr=0.1)
    ours.fuse_torch_adam(part)
    if resumes:
        ours.allocate_adam_state(part)
        part.optimizer.load_state_dict(part.optimizer.state_dict())
        ours.separate_adam_steps(part)
    for number in range(3):
        parameter.grad = torch.cos(number + parameter.detach())
        part.optimizer.step()
    return parameter.detach(), part


@pytest.mark.parametrize("resumes", [False, True])
def test_fused_updates_equal_the_definition(monkeypatch: pytest.MonkeyPatch, resumes: bool) -> None:
    plain, slow = updated({"cuda"}, monkeypatch, resumes)
    fused, fast = updated({"cpu"}, monkeypatch, resumes)
    torch.testing.assert_close(fused, plain)
    shown = [_optimizer(SimpleNamespace(optimizer=part), "no GPU") for part in (slow, fast)]  # type: ignore[arg-type]
    assert shown[0].used == "torch AdamW" and shown[0].obstacle.startswith("no GPU")
    assert shown[1].used == "torch AdamW (fused)" and not shown[1].obstacle
