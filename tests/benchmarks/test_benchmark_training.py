"""Test that variants of the same objective in the training benchmark have equal gradients."""

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
    [(gradients, shares, saved_bytes)] = run_ranks(_measure, 1, tmp_path, initialize=False)
    for name, others in SAME.items():
        for other in others:
            apart = (gradients[other] - gradients[name]).norm() / gradients[name].norm()
            # Megatron-Core's fused cross-entropy computes its gradient in bfloat16.
            assert apart < (1e-2 if "fused" in other else 1e-4), f"{other}: {apart}"
    assert not torch.allclose(gradients["CLM"], gradients["SLM, sidecar"], rtol=1e-2)
    for phases in shares.values():
        assert sum(phases.values()) == pytest.approx(1)
        assert 0 < phases["optimizer"] < phases["forward, backward"] < 1
    assert 0 < saved_bytes["SLM, sidecar, filtered"] < saved_bytes["SLM, sidecar"] <= saved_bytes["CLM"]


def _measure(
    rank: int, world_size: int, directory: Path
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]], dict[str, int]]:
    """Return the gradients of the third step, the phase shares and the bytes of saved values by variant."""
    from benchmark_training import Bench, measure, quiet

    names = [name for base, others in SAME.items() for name in (base, *others)] + ["SLM, sidecar, filtered"]
    bench = Bench("tiny", directory, 4)
    with quiet():
        bench.prepare()
        measurements = measure(bench, names, steps=2, warmup=1)
    return (
        {name: _gradients(each.run.state.model_chunks[0]) for name, each in measurements.items()},
        {name: each.shares() for name, each in measurements.items()},
        {name: each.saved_bytes for name, each in measurements.items()},
    )


def _gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.main_grad.flatten() for weight in model.parameters()])
