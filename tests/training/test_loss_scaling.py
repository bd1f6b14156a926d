"""Loss scaling of fp16: exact scales, skipped steps after an overflow, and the scale across a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_slm.mcore import optimizer as mcore_optimizer
from megatron_slm.mcore.optimizer import prepare_gradients
from megatron_slm.testing.tiny import command, make_corpus, records, run_each

SLM = {"objective": "slm", "slm_score": "token-loss", "slm_selection_ratio": 0.5, "num_layers": 1, "eval_iters": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Return the directories and outcomes of several runs in one process."""
    root = tmp_path_factory.mktemp("fp16")
    corpus = make_corpus(root / "corpus", 1)
    growing = {"initial_loss_scale": 8, "loss_scale_window": 2, "train_iters": 5, "save_interval": 3}
    variants: dict[str, dict[str, Any]] = {
        "fp32": {"train_iters": 2},
        "static 1": {"fp16": True, "loss_scale": 1, "train_iters": 2},
        "static 16": {"fp16": True, "loss_scale": 16, "train_iters": 2},
        "sharded 16": {"fp16": True, "loss_scale": 16, "train_iters": 2, "use_distributed_optimizer": True},
        "experts": {"fp16": True, "initial_loss_scale": 2**30, "hysteresis": 1, "train_iters": 2, "num_experts": 2},
        "static 2^40": {"fp16": True, "loss_scale": 2**40, "train_iters": 2},
        "bf16": {"bf16": True, "loss_scale": 16, "train_iters": 1},
        "overflow": {"fp16": True, "initial_loss_scale": 2**30, "hysteresis": 1, "train_iters": 3},
        "minimum": {"fp16": True, "initial_loss_scale": 2**30, "min_loss_scale": 2**29, "train_iters": 9},
        "growing": {"fp16": True, **growing},
        "resumed": {"fp16": True, **growing, "load": root / "growing", "ckpt_step": 3},
    }
    argv = {name: command(corpus, root / name, **{**SLM, **flags}) for name, flags in variants.items()}
    outcomes = run_each(*argv.values())
    return {name: (root / name, outcome) for name, outcome in zip(argv, outcomes, strict=True)}


def steps(runs: dict[str, tuple[Path, Any]], name: str) -> list[dict[str, Any]]:
    directory, outcome = runs[name]
    assert outcome.code == 0, outcome.errors
    return records(directory)


def test_static_scale_changes_no_result(runs: dict[str, tuple[Path, Any]]) -> None:
    """A power of 2 scales fp16 gradients exactly, and selection sees losses without the scale."""
    exact, one, sixteen = (steps(runs, name) for name in ("fp32", "static 1", "static 16"))
    assert one[0]["selection"] == sixteen[0]["selection"] and one[0]["loss"] == sixteen[0]["loss"]
    assert one[1]["loss"] == pytest.approx(sixteen[1]["loss"], rel=1e-4)
    assert one[0]["grad_norm"] == pytest.approx(sixteen[0]["grad_norm"], rel=1e-3)
    assert one[0]["loss"] == pytest.approx(exact[0]["loss"], rel=1e-3)
    assert one[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=2e-2)
    assert steps(runs, "bf16")[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=5e-2)
    sharded = steps(runs, "sharded 16")
    assert [step["loss"] for step in sharded] == pytest.approx([step["loss"] for step in sixteen], rel=1e-5)
    assert one[0]["loss_scale"] is None and one[0]["steps_skipped"] is None


def test_overflow_skips_the_step(runs: dict[str, tuple[Path, Any]]) -> None:
    found = steps(runs, "overflow")
    assert [each["loss_scale"] for each in found] == [2.0**30, 2.0**29, 2.0**28]
    assert [each["steps_skipped"] for each in found] == [1, 1, 1]
    assert [each["lr"] for each in found] == [found[0]["lr"]] * 3  # the schedule waits for the first update
    assert all(each["grad_norm"] is None for each in found)
    assert [each["loss_scale"] for each in steps(runs, "experts")] == [2.0**30, 2.0**29]
    assert "skipped 1" in runs["overflow"][1].output


def test_overflow_at_a_fixed_or_minimum_scale_ends_the_run(runs: dict[str, tuple[Path, Any]]) -> None:
    for name, step in (("static 2^40", 1), ("minimum", 3)):
        directory, outcome = runs[name]
        assert outcome.code == 3, outcome.errors
        assert f"step {step}: the gradient norm is" in outcome.errors and "decoder.layers.0." in outcome.errors
        event = json.loads((directory / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        assert event["event"] == "nan_gradient" and event["parameters"]["0"]


def test_scale_grows_and_is_resumed(runs: dict[str, tuple[Path, Any]]) -> None:
    growing, resumed = steps(runs, "growing"), steps(runs, "resumed")
    assert [each["loss_scale"] for each in growing] == [8, 8, 16, 16, 32]
    names = ("step", "loss", "selection", "grad_norm", "lr", "loss_scale", "steps_skipped")
    assert [[each[name] for name in names] for each in resumed] == [
        [each[name] for name in names] for each in growing[3:]
    ]


class _Parts:
    """Two optimizers with a scaler each, of which some find an overflow."""

    def __init__(self, overflows: list[bool]) -> None:
        scalers = [DynamicGradScaler(8.0, 1.0, 2.0, 0.5, 2, 1) for _ in overflows]
        self.chained_optimizers = [SimpleNamespace(grad_scaler=scaler) for scaler in scalers]
        self.overflows = overflows

    def prepare_grads(self) -> bool:
        for part, overflow in zip(self.chained_optimizers, self.overflows, strict=True):
            part.grad_scaler.update(overflow)
        return any(self.overflows)

    def get_grad_norm(self) -> float:
        return float("inf") if any(self.overflows) else 1.0


@pytest.mark.parametrize(("overflows", "scale"), [([False, True], 4.0), ([False, False], 8.0), ([True, True], 4.0)])
def test_experts_and_dense_weights_keep_one_scale(
    monkeypatch: pytest.MonkeyPatch, overflows: list[bool], scale: float
) -> None:
    original = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: original(*args, **{**options, "device": "cpu"}))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, device=None: self)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(mcore_optimizer.dist, "all_reduce", lambda flag, op: None)
    parts: Any = _Parts(overflows)
    found = prepare_gradients(parts)
    assert found.overflow == any(overflows)
    assert [float(part.grad_scaler.scale) for part in parts.chained_optimizers] == [scale, scale]
