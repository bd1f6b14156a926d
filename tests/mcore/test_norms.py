"""Norms of the local transformer layer."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_slm.mcore.layers import TorchNorm


def _norm(normalization: str, *, offset: bool) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization=normalization,
        layernorm_zero_centered_gamma=offset,
    )
    return TorchNorm(config, 8, eps=1e-5)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_weights_stored_less_1_compute_the_same(normalization: str) -> None:
    """With --apply-layernorm-1p, values and gradients are those of the same norm; a new norm is equal, too."""
    values = torch.randn(3, 8)
    plain, offset = _norm(normalization, offset=False), _norm(normalization, offset=True)
    assert torch.equal(offset(values), plain(values)) and not offset.weight.any()
    with torch.no_grad():
        for parameter, other in zip(plain.parameters(), offset.parameters(), strict=True):
            parameter.add_(change := torch.randn(8))
            other.add_(change)
    for norm in (plain, offset):
        norm(values).square().sum().backward()
    torch.testing.assert_close(offset(values), plain(values))
    for parameter, other in zip(plain.parameters(), offset.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
