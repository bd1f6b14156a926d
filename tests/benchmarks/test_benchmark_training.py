"""The benchmark of whole steps compares equals: variants of one objective do the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_slm.testing.ranks import run_ranks

SAME = {
    "CLM": ("bare Megatron-Core loop, CLM", "bare Megatron-Core loop, CLM, fused"),
    "SLM, sidecar": ("SLM, sidecar, speculative",),
}


def test_variants_of_one_objective_have_the_same_gradients(tmp_path: Path) -> None:
    [(gradients, shares)] = run_ranks(_measure, 1, tmp_path, initialise=False)
    for name, others in SAME.items():
        for other in others:
            apart = (gradients[other] - gradients[name]).norm() / gradients[name].norm()
            # Megatron-Core's fused cross-entropy hands its gradient on in bfloat16.
            assert apart < (1e-2 if "fused" in other else 1e-4), f"{other}: {apart}"
    assert not torch.allclose(gradients["CLM"], gradients["SLM, sidecar"], rtol=1e-2)
    for phases in shares.values():
        assert sum(phases.values()) == pytest.approx(1)
        assert 0 < phases["optimizer"] < phases["forward, backward"] < 1


def _measure(rank: int, world_size: int, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Gradients of the third step, and the shares of phases, by variant."""
    from benchmark_training import Bench, measure, quiet

    names = [name for base, others in SAME.items() for name in (base, *others)]
    bench = Bench("tiny", folder, 4)
    with quiet():
        bench.prepare()
        contestants = measure(bench, names, steps=2, warmup=1)
    return {name: _gradients(own.run.state.chunks[0]) for name, own in contestants.items()}, {
        name: own.shares() for name, own in contestants.items()
    }


def _gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.main_grad.flatten() for weight in model.parameters()])
