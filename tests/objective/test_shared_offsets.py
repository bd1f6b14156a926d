"""Losses, entropies and gradients do not depend on an offset that all logits of a row share.

Hidden states and weights are multiples of 1/8, so that fp32 logits are exact under every offset and differences come
from the softmax only.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_linear_cross_entropy import VOCAB, B, S, assert_agrees, expected, make, run
from torch import Tensor

from megatron_slm.objective.cross_entropy import vocab_parallel_entropy
from megatron_slm.objective.linear_cross_entropy.chunk_math import TorchChunkMath
from megatron_slm.testing.ranks import run_ranks

OFFSETS = (0.0, 1e3, -1e3, 1e4, -1e4)
MODES: dict[str, dict[str, Any]] = {
    "torch": {"implementation": "torch"},
    "recompute": {"implementation": "chunked"},
    "small blocks": {"implementation": "chunked", "chunk_bytes": 700},
    "kept": {"implementation": "chunked", "saved_logits_bytes": 1 << 20, "chunk_bytes": 700},
    "some early": {"implementation": "chunked", "threshold": 3.5, "chunk_bytes": 3000},
    "z-loss": {"implementation": "chunked", "z_loss": 1e-4},
}


def shifted(offset: float) -> dict[str, Tensor]:
    """Rows of logits that share the offset; every other row has none."""
    data = make()
    for name in ("hidden", "weight"):
        data[name] = (data[name] * 8).round() / 8
    data["hidden"][..., -1] = torch.arange(S * B).view(S, B).remainder(2)
    data["weight"][..., -1] = offset
    return data


def compared(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradient that the offset multiplies: its sum is 0 with errors of the offset's size."""
    return {**values, "hidden": values["hidden"][..., :-1]}


def _on_shards(rank: int, world_size: int, cases: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    return [run(shifted(offset), tp_group=dist.group.WORLD, **mode) for offset, mode in cases]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_offset_changes_nothing(tensor_parallel: int) -> None:
    cases = list(product(OFFSETS, MODES.values()))
    parts = run_ranks(_on_shards, tensor_parallel, cases)
    for number, (offset, mode) in enumerate(cases):
        mine = [part[number] for part in parts]
        got = {**mine[-1], "weight": torch.cat([part["weight"] for part in mine])}
        wanted = compared(expected(shifted(offset), z_loss=mode.get("z_loss", 0.0)))
        assert_agrees(compared(got), wanted, 2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entries", [slice(0, 7), slice(20, 45), slice(VOCAB - 1, VOCAB)], ids=str)
def test_impossible_entries(mode: str, entries: slice) -> None:
    """Logits of -inf: a first block that holds nothing else, a middle, the last entry."""
    data = shifted(1e3)
    data["hidden"][..., -1] = 1.0
    data["weight"][entries, -1] = -torch.inf
    got, wanted = run(data, **MODES[mode]), expected(data, z_loss=MODES[mode].get("z_loss", 0.0))
    impossible = (data["labels"] >= entries.start) & (data["labels"] < entries.stop)
    assert torch.equal(got["loss"].isinf(), impossible)
    finite = {name: values[~impossible] for name, values in got.items() if name in ("loss", "entropy")}
    assert_agrees(finite, {name: wanted[name][~impossible] for name in finite}, 2e-6)


@pytest.mark.parametrize("offset", OFFSETS)
def test_entropy_of_whole_logits(offset: float) -> None:
    data = shifted(offset)
    logits = data["hidden"] @ data["weight"].t()
    wanted = expected(data)["entropy"]
    assert_agrees({"": vocab_parallel_entropy(logits, None, VOCAB)}, {"": wanted}, 2e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_saved_block_gives_the_same_statistics(with_entropy: bool, softcap: float | None) -> None:
    logits, labels = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * 5, torch.arange(7)
    found = [
        TorchChunkMath(softcap, torch.float32).statistics(logits.clone(), labels, with_entropy=with_entropy, keep=keep)
        for keep in (False, True)
    ]
    assert torch.equal(found[0].loss, found[1].loss)
    if with_entropy:
        assert torch.equal(found[0].entropy, found[1].entropy)
