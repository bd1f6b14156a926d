"""Test that checkpoints load across implementations: torch and fused Adam, local and Transformer Engine layers."""

from __future__ import annotations

import contextlib
import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_slm.cli.pretrain import main
from megatron_slm.mcore import optimizer as our_optimizer
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, make_corpus, records

pytestmark = pytest.mark.slow


class FusedAdam(torch.optim.Optimizer):
    """Imitate Transformer Engine's optimizer: a step per group, ``bias_correction``, no step per parameter."""

    def __init__(self, params: Any, *, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool):
        assert adam_w_mode
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int) and group["bias_correction"]
            (beta1, beta2), number = group["betas"], group["step"]
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                assert state.keys() == {"exp_avg", "exp_avg_sq"}
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                scale = (state["exp_avg_sq"] / (1 - beta2**number)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**number))


def _fused_adam(stack: ExitStack) -> None:
    """Patch Megatron-Core as if Transformer Engine were installed."""
    for owner, name, value in (
        (megatron_optimizer, "Adam", FusedAdam),
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", FusedAdam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ):
        stack.enter_context(mock.patch.object(owner, name, value))


def _extra_state(stack: ExitStack) -> None:
    """Give norm layers an extra state, as in Transformer Engine, which must not be read from a checkpoint."""

    def set_extra_state(module: torch.nn.Module, state: Any) -> None:
        assert state == "unchanged", "read from a file"

    stack.enter_context(mock.patch.object(torch.nn.RMSNorm, "get_extra_state", lambda module: "unchanged"))
    stack.enter_context(mock.patch.object(torch.nn.RMSNorm, "set_extra_state", set_extra_state))


def _torch_kernel(stack: ExitStack) -> None:
    """Use torch's fused kernel, as on a GPU."""
    stack.enter_context(mock.patch.object(our_optimizer, "FUSED_DEVICES", {"cpu"}))


VARIANTS = {"torch": None, "fused": _fused_adam, "kernel": _torch_kernel, "extra": _extra_state}


def _run_each(rank: int, world_size: int, jobs: list[tuple[str, list[str]]]) -> None:
    for variant, argv in jobs:
        errors = io.StringIO()
        with ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            if (prepare := VARIANTS[variant]) is not None:
                prepare(stack)
            code = main(argv)
        assert code == 0, (variant, errors.getvalue())


@pytest.mark.parametrize(
    "flags", [[], ["--use-distributed-optimizer"], ["--bf16"]], ids=["plain", "distributed", "bf16"]
)
def test_runs_resume_with_the_other_implementation(tmp_path: Path, flags: list[str]) -> None:
    corpus = make_corpus(tmp_path / "corpus", 1)
    settings = {"train_iters": 4, "eval_iters": 0, "num_layers": 1}
    jobs = [("torch", command(corpus, tmp_path / "uninterrupted", losses_only=True, **settings) + flags)]
    for variant in VARIANTS:
        jobs.append((variant, command(corpus, tmp_path / variant, exit_interval=2, **settings) + flags))
    pairs = [("torch", "fused"), ("fused", "torch"), ("fused", "fused"), ("torch", "extra"), ("extra", "torch")]
    pairs += [("torch", "kernel"), ("kernel", "torch"), ("kernel", "kernel"), ("fused", "kernel"), ("kernel", "fused")]
    for one, other in pairs:
        save = tmp_path / f"{one}-{other}"
        jobs.append((other, command(corpus, save, load=tmp_path / one, losses_only=True, **settings) + flags))
    run_ranks(_run_each, 1, jobs, initialize=False)
    expected = [record["loss"] for record in records(tmp_path / "uninterrupted")][2:]
    for one, other in pairs:
        losses = [record["loss"] for record in records(tmp_path / f"{one}-{other}")]
        assert losses == pytest.approx(expected, rel=1e-5), (one, other)
