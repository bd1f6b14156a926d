"""Test MTP heads against the plain definition: counted tokens and their gradients."""

from __future__ import annotations

import definition
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.settings import TokenLosses
from megatron_slm.objective.multi_token import multi_token_loss
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import select
from megatron_slm.objective.selection.policy import parse_policy
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch
from megatron_slm.testing.ranks import run_ranks

B, S, D = 3, 8, 2


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("text", [None, "excess", "reference-entropy:0.4"])
def test_heads_count_the_tokens_of_the_definition(text: str | None, own: bool) -> None:
    chance = torch.Generator().manual_seed(5)
    main, reference, entropy = (torch.rand(B, S, generator=chance) for _ in range(3))
    heads = [torch.rand(B, S, generator=chance).requires_grad_() for _ in range(D)]
    valid = torch.rand(B, S, generator=chance) < 0.8
    index = torch.arange(B * S).view(B, S)
    policy = None if text is None else parse_policy(text)
    selector = SelectionConfig(policy, "sequence", mtp_loss_weight=0.3, mtp_is_independent=own)
    tokens = TokenBatch(main, valid, index, index, ReferenceScores(reference, entropy))
    selection = select(tokens, selector, 0.6)
    loss = multi_token_loss([TokenLosses(head, None) for head in heads], tokens, selection, selector, 0.6)
    gradients = torch.autograd.grad(loss, heads)

    expected = 0.0
    for distance, head in enumerate(heads, start=1):
        weight = torch.zeros(B, S)
        for row in range(B):
            places = range(S - distance)
            alive = [bool(valid[row, i + distance]) for i in places]
            if text is None:
                chosen = alive
            elif not own:
                chosen = [bool(selection.selected[row, i + distance]) for i in places]
            elif text == "excess":
                scores = [float(head.detach()[row, i] - reference[row, i + distance]) for i in places]
                chosen = definition.select(scores, alive, 0.6)
            else:
                scores = [float(entropy[row, i + distance]) for i in places]
                chosen = definition.select(scores, alive, 0.4, lowest=True)
            weight[row, : S - distance] = torch.tensor(chosen).float()
        expected += float((weight * head).detach().sum()) * 0.3 / D
        torch.testing.assert_close(gradients[distance - 1], weight * 0.3 / D)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def _micro_batch() -> tuple[list[Tensor], TokenBatch]:
    chance = torch.Generator().manual_seed(6)
    main, *heads, reference = (torch.rand(B, S, generator=chance) for _ in range(2 + D))
    index = torch.arange(100, 100 + B * S).view(B, S)
    return heads, TokenBatch(main, torch.rand(B, S, generator=chance) < 0.8, index, index, ReferenceScores(reference))


def _head_gradients(rank: int, world_size: int, own: bool) -> Tensor:
    """[D, b, s], zero but for this rank's columns: a part from the front and the matching one from the back, as in
    training."""
    heads, tokens = _micro_batch()
    chunk = S // (2 * world_size)
    places = torch.arange(S).view(-1, chunk)[[rank, 2 * world_size - 1 - rank]].flatten()
    assert tokens.reference is not None
    heads = [head[:, places].requires_grad_() for head in heads]
    tokens = TokenBatch(
        tokens.loss[:, places],
        tokens.valid[:, places],
        tokens.global_token_index[:, places],
        tokens.step_token_index[:, places],
        ReferenceScores(tokens.reference.loss[:, places]),
    )
    world = dist.group.WORLD
    selector = SelectionConfig(
        parse_policy("excess"), "micro-batch", world, world, mtp_loss_weight=0.3, mtp_is_independent=own
    )
    loss = multi_token_loss(
        [TokenLosses(head, None) for head in heads], tokens, select(tokens, selector, 0.6), selector, 0.6
    )
    whole = torch.zeros(D, B, S)
    whole[:, :, places] = torch.stack(torch.autograd.grad(loss, heads))
    return whole


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_ranks_look_ahead_across_each_other(ranks: int, own: bool) -> None:
    """On four ranks each part is one token long, and the second head looks beyond its neighbor."""
    [expected] = run_ranks(_head_gradients, 1, own)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(sum(run_ranks(_head_gradients, ranks, own)), expected)
