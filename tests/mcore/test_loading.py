"""Weights are loaded in high precision: Megatron-Core 0.19 would quantize them while it reads them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from megatron_slm.checkpoint import weights
from megatron_slm.mcore import loading


class Streaming:
    """Stands for the strategy of Megatron-Core 0.19."""

    def __init__(self, cache_metadata: bool = False, stream_ckpt_dequant: bool = True) -> None:
        self.stream_ckpt_dequant = stream_ckpt_dequant


class Former:
    """Stands for the strategy of Megatron-Core 0.16."""


@pytest.mark.parametrize(("strategy", "is_given"), [(Streaming, True), (Former, False)])
def test_fp8_weights_are_not_quantized_while_loading(
    monkeypatch: pytest.MonkeyPatch, strategy: type, is_given: bool
) -> None:
    given: list[object] = []
    monkeypatch.setattr(loading, "TorchDistLoadShardedStrategy", strategy)
    monkeypatch.setattr(dist_checkpointing, "load", lambda state, path, found: given.append(found) or {})
    monkeypatch.setattr(weights, "on_every_rank", lambda load: load())
    monkeypatch.setattr(weights, "explained_load", lambda directory, flag: nullcontext())
    assert weights.load_state({}, Path("x"), "--load") == {}
    (found,) = given
    assert getattr(found, "stream_ckpt_dequant", None) is (False if is_given else None)
