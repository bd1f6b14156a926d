"""Test that attention within documents equals masked attention, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_slm.data.batches import document_lengths, document_mask
from megatron_slm.mcore.layers import TorchAttention

LENGTH, SIZE = 24, 6
DOCUMENTS = {
    "several": [[5, 1, 11, 7], [3, 21]],
    "one": [[LENGTH], [LENGTH]],
    "single tokens": [[1] * LENGTH, [LENGTH - 2, 1, 1]],
}


def attend(heads: int, groups: int, mask: Tensor, seed: int = 3) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values in float64."""
    config = TransformerConfig(num_layers=1, hidden_size=heads * SIZE, num_attention_heads=heads, attention_dropout=0.0)
    attention = TorchAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(seed)
    shapes = [(LENGTH, 2, count, SIZE) for count in (heads, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    output = attention(*inputs, mask)
    incoming = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return [output, *torch.autograd.grad(output, inputs, incoming)]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_attention_within_documents_equals_masked_attention(name: str, groups: int) -> None:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS[name]]
    numbers = torch.stack(rows).int()
    lengths = document_lengths(numbers)
    assert [[length for length in row if length] for row in lengths.tolist()] == DOCUMENTS[name]
    for found, wanted in zip(attend(4, groups, lengths), attend(4, groups, document_mask(numbers)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
