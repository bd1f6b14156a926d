"""Test that a run that resumes a checkpoint of Megatron-LM takes the same step as Megatron-LM itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_slm.config.flags import parse
from megatron_slm.data.batches import BatchStream
from megatron_slm.runtime import process
from megatron_slm.runtime.console import make_console
from megatron_slm.testing.megatron_models import command
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer
from megatron_slm.training.loop import one_step
from megatron_slm.training.preflight import resolve_values
from megatron_slm.training.setup import build_run, parallel_layout

SAMPLES, LENGTH, VOCABULARY = 4, 16, 60  # as in record.py
PADDED = 64  # rows, which all take part in Megatron-LM's softmax


class RecordedTokens(Dataset[dict[str, Tensor]]):
    """Hold the global batch of every step of record.py."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(SAMPLES * (LENGTH + 1)) ** 2 * 7 % VOCABULARY).view(SAMPLES, -1)[index]
        mask = torch.ones(LENGTH)
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": mask, "position_ids": torch.arange(LENGTH)}


def _steps(rank: int, world_size: int, commands: list[list[str]]) -> list[list[tuple[float, float]]]:
    """Resume every run, and return loss and gradient norm of two steps on the same batch."""
    results = []
    for argv in commands:
        config = resolve_values(parse(argv).config, world_size)
        groups = process.start(parallel_layout(config))
        run = build_run(config, build_run_tokenizer(config), groups, make_console(enabled=False))
        assert run.progress.step == 3
        stepped = []
        for _ in range(2):
            step = one_step(run, BatchStream(RecordedTokens(), run.shape, device=groups.device), lambda *_: True)
            assert step is not None
            stepped.append((float(step.sums.values[0] / step.sums.selected), step.grad_norm))
        results.append(stepped)
        process.stop()
    return results


@pytest.mark.parametrize(
    ("layout", "names"),
    [({}, ("llama", "llama-twin")), ({"tensor_model_parallel_size": 2}, ("llama-twin",))],
    ids=["one rank", "tensor parallel"],
)
def test_steps_equal_those_of_megatron_lm(recorded: Path, layout: dict[str, Any], names: tuple[str, ...]) -> None:
    """The loss of the second step depends on the update of the first, and with it on the optimizer state."""
    flags = {"use_distributed_optimizer": True, "vocab_size": PADDED, **layout}
    commands = [command("llama", load=recorded / name, **flags) for name in names]
    recording = json.loads((recorded / "llama" / "losses.json").read_text())
    first, second = (float(np.mean(recording[name])) for name in ("losses", "next_losses"))
    assert abs(first - second) > 1e-2
    for steps in run_ranks(_steps, 2 if layout else 1, commands, initialize=False)[0]:
        assert [loss for loss, _ in steps] == pytest.approx([first, second], abs=5e-6)
        assert steps[0][1] == pytest.approx(recording["next_grad_norm"], rel=1e-5)
