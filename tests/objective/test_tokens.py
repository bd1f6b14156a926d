"""Micro-batches of a step that are kept until it ends."""

from __future__ import annotations

import torch

from megatron_slm.objective.tokens import ReferenceScores, TokenBatch, concat_micro_batches


def test_concatenated_micro_batches_hold_no_graph() -> None:
    """A graph would keep the activations of all micro-batches in memory."""
    index = torch.arange(6).view(2, 3)
    loss = torch.ones(2, 3, requires_grad=True)
    batches = [
        TokenBatch(loss * factor, index > 0, index + shift, index, ReferenceScores(loss.detach() * factor))
        for factor, shift in ((2.0, 0), (3.0, 6))
    ]
    tokens = concat_micro_batches(batches)
    assert not tokens.loss.requires_grad
    assert tokens.loss.tolist() == [[2.0] * 3] * 2 + [[3.0] * 3] * 2
    assert tokens.global_token_index.flatten().tolist() == list(range(12))
    assert tokens.reference is not None and torch.equal(tokens.reference.loss, tokens.loss)
