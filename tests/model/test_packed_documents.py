"""Test that packed documents equal isolated ones, with torch in place of Transformer Engine's attention."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_slm.config.schema import ObjectiveConfig
from megatron_slm.data.batches import MicroBatch
from megatron_slm.mcore.layers import TorchAttention
from megatron_slm.model.packed_documents import packed_sequences
from megatron_slm.model.pipeline import run_pipeline
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.runtime import process
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny_gpt import build_tiny_gpt

LENGTH, VOCAB = 12, 61
DOCUMENTS = [[5, 1, 6], [3, 9], [12]]


def packed_attention(
    self: TorchAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> Tensor:
    """Attend as Transformer Engine does: [t, heads, d] in, [t, heads * d] out, by cumulative lengths."""
    packed = options["packed_seq_params"]
    assert packed.qkv_format == "thd" and packed.cu_seqlens_q.dtype == torch.int32
    lengths = packed.cu_seqlens_q.diff().tolist()
    assert max(lengths) <= packed.max_seqlen_q <= LENGTH
    parts = (values[:, None].split(lengths) for values in (query, key, value))
    outputs = [self._attend(q, k, v, mask=None, is_causal=True) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs)[:, 0]


def make_batch(generator: torch.Generator) -> MicroBatch:
    rows = [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in DOCUMENTS]
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in DOCUMENTS]
    tokens, labels = (torch.randint(0, VOCAB, (3, LENGTH), generator=generator) for _ in range(2))
    mask = torch.rand(3, LENGTH, generator=generator) < 0.7
    index = torch.arange(3)
    return MicroBatch(tokens, labels, mask, torch.stack(positions), index, 0, torch.stack(rows).int())


def results(chunk: Any, batch: MicroBatch, backward_filter: BackwardFilter | None) -> list[Tensor]:
    """Return the losses and gradients of valid tokens, with gradients in the forward pass."""

    def last_stage(index: int, batch: MicroBatch, hidden: Any) -> tuple[Tensor, Tensor, Tensor]:
        policy = ForwardGradPolicy(batch.loss_mask)
        loss = hidden.token_losses(batch.labels, forward_grad=policy).loss
        if backward_filter is not None:
            backward_filter.select(index, batch.loss_mask)
        return (loss * batch.loss_mask).sum(), batch.loss_mask.sum(), loss.detach()

    (losses,) = run_pipeline([chunk], [batch], last_stage, forward_only=False, backward_filter=backward_filter)
    gradients = [parameter.grad for parameter in chunk.parameters()]
    chunk.zero_grad()
    return [losses, *gradients]


def _packed_and_isolated(rank: int, world_size: int, position_embedding: str, is_filtered: bool) -> list[list[Tensor]]:
    groups = process.start(ParallelLayout(), seed=3)
    objective = ObjectiveConfig(slm_saved_logits_mb=0)
    settings = {"position_embedding_type": position_embedding}
    backward_filter = BackwardFilter(groups) if is_filtered else None
    options = {"objective": objective, "backward_filter": backward_filter}
    chunks = [
        build_tiny_gpt(groups, LENGTH, VOCAB, settings, resets_positions=resets, **options).double()
        for resets in (True, False)
    ]
    isolated, packing = chunks
    packing.load_state_dict(isolated.state_dict())
    packing.has_torch_attention = False
    batch = make_batch(torch.Generator().manual_seed(5))
    wanted = results(isolated, batch, backward_filter)
    with mock.patch.object(TorchAttention, "forward", packed_attention):
        found = results(packing, batch, backward_filter)
    process.stop()
    return [found, wanted]


@pytest.mark.parametrize(
    ("position_embedding", "is_filtered"), [("rope", False), ("learned_absolute", False), ("learned_absolute", True)]
)
def test_packed_documents_equal_isolated_ones(position_embedding: str, is_filtered: bool) -> None:
    """Filtered backward passes take the rows of selected tokens in the order of the model."""
    ((found, wanted),) = run_ranks(_packed_and_isolated, 1, position_embedding, is_filtered, initialize=False)
    assert found[0].shape == (3, LENGTH) and len(found) > 10
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_packed_sequences_have_host_numbers() -> None:
    packed = packed_sequences(torch.tensor([[5, 1, 2, 0], [8, 0, 0, 0]]), torch.device("cpu"))
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 5, 6, 8, 16]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 8 and packed.qkv_format == "thd"
    assert packed_sequences(torch.tensor([[5, 4, 3]]), torch.device("cpu")).max_seqlen_q == 8
