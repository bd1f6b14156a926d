"""Vocab-parallel token losses, entropies and gradients against the plain float64 definition."""

from __future__ import annotations

import definition
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.objective.cross_entropy import vocab_parallel_entropy, vocab_parallel_token_loss
from megatron_slm.objective.linear_cross_entropy.api import linear_cross_entropy
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.testing.ranks import run_ranks

SHAPE, VOCAB, PADDED = (3, 7), 45, 48


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a padded vocabulary, labels, and the weight of each token's loss, half of them 0."""
    chance = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(*SHAPE, PADDED, generator=chance)).to(dtype)
    labels = torch.randint(0, VOCAB, SHAPE, generator=chance)
    return logits, labels, torch.rand(SHAPE, generator=chance).round()


def expected(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = logits.detach().double().requires_grad_()
    loss = definition.token_losses(exact[..., :VOCAB], labels)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), exact)
    return loss.detach(), gradient, definition.entropies(exact[..., :VOCAB].detach())


def _on_shards(rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels, weight = make(dtype)
    shard = logits.chunk(world_size, dim=-1)[rank].contiguous().requires_grad_()
    loss = vocab_parallel_token_loss(shard, labels, dist.group.WORLD, VOCAB)
    (gradient,) = torch.autograd.grad((loss * weight).sum(), shard)
    return loss.detach(), gradient, vocab_parallel_entropy(shard.detach(), dist.group.WORLD, VOCAB)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_agrees_with_the_definition(tensor_parallel: int, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels, weight = make(dtype)
    loss, gradient, entropy = expected(logits, labels, weight)
    parts = run_ranks(_on_shards, tensor_parallel, dtype)
    for part in parts:
        torch.testing.assert_close(part[0].double(), loss, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(part[2].double(), entropy, rtol=tolerance, atol=tolerance)
        assert part[0].dtype == torch.float32
    whole = torch.cat([part[1] for part in parts], dim=-1)
    assert whole.dtype == dtype
    torch.testing.assert_close(whole.double(), gradient, rtol=tolerance, atol=tolerance)
    assert bool((whole[weight == 0] == 0).all()), "an unselected row got a gradient"
    assert bool((whole[..., VOCAB:] == 0).all()), "the padding got a gradient"


def test_finite_differences() -> None:
    logits, labels, _ = make()
    logits = logits[:1, :3].clone()
    exact = logits.clone().requires_grad_()
    loss = (vocab_parallel_token_loss(exact, labels[:1, :3], None, VOCAB) * 1.0).sum()
    (gradient,) = torch.autograd.grad(loss, exact)
    step = 1e-6
    for place in [(0, 0, 0), (0, 1, 17), (0, 2, int(labels[0, 2]))]:
        up, down = logits.double(), logits.double()
        up[place] += step
        down[place] -= step
        difference = (
            definition.token_losses(up[..., :VOCAB], labels[:1, :3]).sum()
            - definition.token_losses(down[..., :VOCAB], labels[:1, :3]).sum()
        ) / (2 * step)
        assert float(gradient[place]) == pytest.approx(float(difference), abs=1e-4)


def test_logits_are_left_as_they_are() -> None:
    logits, labels, _ = make()
    before = logits.clone()
    vocab_parallel_token_loss(logits.requires_grad_(), labels, None, VOCAB).sum().backward()
    vocab_parallel_entropy(logits, None, VOCAB)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_label_outside_the_vocabulary_is_refused(label: int) -> None:
    logits, labels, _ = make()
    labels[0, 0] = label
    with pytest.raises(ValueError, match=f"a label is {label}, and the vocabulary has {VOCAB}"):
        vocab_parallel_token_loss(logits, labels, None, VOCAB)


class OnGpu(Tensor):
    """A tensor that names a GPU as its device."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_label_outside_the_vocabulary_has_no_loss_on_a_gpu(label: int) -> None:
    """The host does not wait for the labels: the NaN reaches the run's check for divergence."""
    logits, labels, _ = make()
    logits.requires_grad_()
    labels[1, 2] = label
    loss = vocab_parallel_token_loss(logits, labels.as_subclass(OnGpu), None, VOCAB)
    assert loss.isnan().nonzero().tolist() == [[1, 2]]
    hidden, settings = torch.randn(*SHAPE, 8), LinearCrossEntropyConfig(vocab_size=VOCAB)
    found = linear_cross_entropy(hidden, torch.randn(PADDED, 8), labels.as_subclass(OnGpu), settings).loss
    assert found.isnan().nonzero().tolist() == [[1, 2]]
