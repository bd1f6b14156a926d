"""Weight gradients are added to the gradient buffer by the products of Transformer Engine, or by apex's kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

from megatron_slm.config.flags import parse
from megatron_slm.mcore import gradient_fusion
from megatron_slm.mcore.gradient_fusion import fusion_without_apex
from megatron_slm.model.gpt import transformer_config

MODEL = "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128"
OFF = "--no-gradient-accumulation-fusion"


@pytest.mark.parametrize(
    ("device", "implementation", "has_apex", "flags", "fuses"),
    [
        ("cuda", "transformer_engine", False, "", True),
        ("cuda", "transformer_engine", True, OFF, False),
        ("cuda", "local", True, "", True),
        ("cuda", "local", True, OFF, False),
        ("cuda", "local", False, "", False),
        ("cpu", "local", True, "", False),
    ],
)
def test_fusion_needs_a_kernel(
    monkeypatch: pytest.MonkeyPatch, device: str, implementation: str, has_apex: bool, flags: str, fuses: bool
) -> None:
    monkeypatch.setattr(gradient_fusion, "apex_is_available", has_apex)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())  # Transformer Engine's
    config, groups = parse(f"{MODEL} {flags}".split()).config, SimpleNamespace(device=torch.device(device))
    arguments: Any = (config.model, config.parallel, config.training, groups, implementation)
    assert transformer_config(*arguments, params_dtype="fp32").gradient_accumulation_fusion is fuses


@pytest.mark.skipif(gradient_fusion.apex_is_available, reason="apex is installed")
def test_lm_head_beside_engine_layers_needs_no_apex() -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        gradient_accumulation_fusion=True,
        perform_initialization=False,
    )
    group: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    options: dict[str, Any] = {"config": config, "init_method": lambda weight: None, "tp_group": group}
    options |= {"bias": False, "skip_weight_param_allocation": True}
    with fusion_without_apex():
        ColumnParallelLinear(8, 16, **options)
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        ColumnParallelLinear(8, 16, **options)
