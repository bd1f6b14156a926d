"""Linear cross-entropy block by block: at no time is there more than one block of logits.

Without early tokens a block is all rows times a part of the vocabulary. So the weight is read once and each part of
its gradient is written once, in the backward pass as well, where the lse is known and blocks need nothing from each
other. With early tokens a block is some rows times the whole shard, because their gradient needs the lse first. Where
the logits are small enough to be kept, they are, and nothing is early: that is as few FLOPs in larger matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.blocks import BlockMath, TorchBlocks, slices
from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.linear_cross_entropy.head import LMHead
from megatron_slm.objective.linear_cross_entropy.shard import (
    Shard,
    Statistics,
    gather_sequence,
    reduce_hidden_gradient,
)
from megatron_slm.objective.linear_cross_entropy.weight_gradient import WeightGradient, add_product

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # what fits the caches of a CPU; what keeps a GPU busy
SHARE_OF_LOGITS = 1 / 16  # no block of all rows is larger than this part of the logits
# Rows of a block of early tokens, and how many blocks there are at least. Each block reads the weight twice and
# rewrites its gradient, which by count takes 41 ÷ rows of the matrix products' time on two CPU cores (170 GFLOP/s,
# 15 GB/s) and 580 ÷ rows on an H100 in bf16 (700 TFLOP/s, 3.3 TB/s): what saves memory here costs time.
EARLY_ROWS = {"cpu": 512, "cuda": 4096}
MIN_ROW_BLOCKS = {"cpu": 8, "cuda": 2}
MIN_ENTRIES = 64  # of a block of all rows, whatever their number
SPREAD_ROWS = 256  # moved at a time


def blockwise_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: LMHead,
    shard: Shard,
    early: EarlySelection | None,
    with_entropy: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Token losses and entropies [s, b] as the one function describes them."""
    loss, entropy = _BlockwiseLoss.apply(hidden, weight, labels, head, shard, early, with_entropy, needs_gradient)
    return loss, entropy


def block_math(head: LMHead) -> BlockMath:
    """The arithmetic of the engine; Triton is imported where it is used and nowhere else."""
    if head.engine == "triton":
        from megatron_slm.objective.linear_cross_entropy.triton_blocks import TritonBlocks

        return TritonBlocks(head.softcap, head.z_loss)
    return TorchBlocks(head.softcap, head.z_loss)


@dataclass
class _Rows:
    """Rows of hidden states before a vocabulary shard, and the blocks that their logits are computed in."""

    hidden: Tensor  # [n, h]
    weight: Tensor  # [V / tp, h], detached
    labels: Tensor  # [n], counted from the first entry of the shard
    head: LMHead
    shard: Shard
    math: BlockMath
    block_bytes: int  # most that a block of all rows may take

    def __len__(self) -> int:
        return self.hidden.size(0)

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(
            self.hidden[rows], self.weight, self.labels[rows], self.head, self.shard, self.math, self.block_bytes
        )

    def vocabulary_blocks(self) -> list[slice]:
        """Parts of the shard's real entries; all rows of one make a block."""
        if not len(self):
            return []
        bytes_per_entry = self.hidden.element_size() * len(self)
        return slices(self.shard.real, max(self.block_bytes // bytes_per_entry, MIN_ENTRIES))

    def row_blocks(self) -> list[slice]:
        """Parts of the rows; the whole shard before one makes a block."""
        device = self.hidden.device.type
        rows = EARLY_ROWS[device]
        if self.head.block_bytes is not None:
            rows = self.head.block_bytes // (self.hidden.element_size() * self.shard.size)
        return slices(len(self), max(min(rows, -(-len(self) // MIN_ROW_BLOCKS[device])), 1))

    def logits(self, entries: slice, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """A block of logits, in the memory ``out`` where it is given."""
        hidden, weight = self.hidden[rows], self.weight[entries]
        place = None if out is None else out[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        return torch.mm(hidden, weight.t(), out=place)

    def memory_of(self, blocks: list[slice], across: int) -> Tensor:
        """Memory that the logits of each of these blocks fit in."""
        widest = max((block.stop - block.start for block in blocks), default=0)
        return self.hidden.new_empty(widest * across)


class _BlockwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        head: LMHead,
        shard: Shard,
        early: EarlySelection | None,
        with_entropy: bool,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = _rows(hidden, weight, labels, head, shard)
        fits = len(rows) * shard.size * weight.element_size() <= head.kept_bytes
        kept: list[Tensor] | None = [] if needs_gradient and fits else None
        done: _EarlyWork | None = None
        if early is not None and kept is None:
            statistics, done = _early_pass(rows, early, with_entropy)
        else:
            statistics = _statistics(rows, with_entropy, kept)
        ctx.save_for_backward(hidden, weight, labels, statistics.lse)
        ctx.head, ctx.shard, ctx.kept, ctx.done = head, shard, kept, done
        loss = (statistics.lse - statistics.label_logit).view(labels.shape)
        if statistics.mean is None:
            return loss, None
        entropy = (statistics.lse - statistics.mean).view(labels.shape)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        rows = _rows(hidden, weight, labels, ctx.head, ctx.shard)
        gradient = _Gradient(torch.zeros_like(rows.hidden), WeightGradient(weight))
        incoming = grad_loss.reshape(-1).float()
        done, ctx.done = ctx.done, None
        if done is None:
            gradient.add(rows, lse, incoming, ctx.kept)
        else:
            gradient.finish(rows, lse, incoming, done)
        ctx.kept = None
        whole = gradient.hidden.view(*labels.shape, hidden.size(-1))
        part = reduce_hidden_gradient(whole, ctx.head.group, ctx.head.sequence_parallel)
        return part, gradient.weight.result(), None, None, None, None, None, None


def _rows(hidden: Tensor, weight: Tensor, labels: Tensor, head: LMHead, shard: Shard) -> _Rows:
    whole = gather_sequence(hidden.detach(), head.group, head.sequence_parallel)
    flat = whole.reshape(-1, whole.size(-1))
    math = block_math(head)
    whole_bytes = hidden.element_size() * len(flat) * shard.size
    most = head.block_bytes or min(BLOCK_BYTES[hidden.device.type], int(whole_bytes * SHARE_OF_LOGITS))
    return _Rows(flat, weight.detach(), labels.reshape(-1) - shard.first, head, shard, math, most)


def _statistics(rows: _Rows, with_mean: bool, kept: list[Tensor] | None) -> Statistics:
    """The figures of all rows over all shards; the logits go to ``kept``, one tensor per block, where it is a list."""
    total = Statistics.empty(len(rows), rows.hidden.device, with_mean)
    blocks = rows.vocabulary_blocks()
    memory = rows.memory_of(blocks, len(rows)) if kept is None else None
    for entries in blocks:
        logits = rows.logits(entries, out=memory)
        labels = rows.labels - entries.start
        total.merge(rows.math.statistics(logits, labels, with_mean=with_mean, keep=kept is not None))
        if kept is not None:
            kept.append(logits)
    total.reduce(rows.shard.group)
    return total


@dataclass
class _EarlyWork:
    """What was done before the selection was known."""

    chosen: Tensor  # [N] bool
    hidden: Tensor  # [N, h], gradient for weight 1; 0 where not chosen
    weight: Tensor  # [V / tp, h] fp32, the same


def _early_pass(rows: _Rows, early: EarlySelection, with_mean: bool) -> tuple[Statistics, _EarlyWork]:
    """Figures of all rows, and the gradients of those that ``early`` chooses, in one pass over blocks of rows."""
    real = slice(0, rows.shard.real)
    done = _EarlyWork(
        rows.labels.new_zeros(len(rows), dtype=torch.bool),
        torch.zeros_like(rows.hidden),
        torch.zeros_like(rows.weight, dtype=torch.float32),
    )
    blocks = rows.row_blocks()
    memory = rows.memory_of(blocks, rows.shard.real)
    parts = [Statistics.empty(0, rows.hidden.device, with_mean)]
    for block in blocks:
        logits = rows.logits(real, block, memory)
        labels = rows.labels[block]
        part = Statistics.empty(len(labels), logits.device, with_mean)
        if rows.shard.real:
            part = rows.math.statistics(logits, labels, with_mean=with_mean, keep=True)
        part.reduce(rows.shard.group)
        parts.append(part)
        chosen = early.chosen(block, part.lse - part.label_logit)
        done.chosen[block] = chosen
        places = chosen.nonzero().squeeze(1)
        change = rows.math.picked_gradient(logits, labels, part.lse, places)
        done.hidden[block][places] = change @ rows.weight[real]
        add_product(done.weight[real], change.t(), rows.hidden[block][places])
    return Statistics.joined(parts), done


@dataclass
class _Gradient:
    """The gradients of hidden states [N, h] (of this vocabulary shard alone) and of the weight."""

    hidden: Tensor
    weight: WeightGradient

    def finish(self, rows: _Rows, lse: Tensor, incoming: Tensor, done: _EarlyWork) -> None:
        """Make early work right: scale it, compute what is missing, take away what was too much.

        Where more rows are wrong than are selected at all, it is cheaper, and more exact, to begin anew.
        """
        meant = incoming[done.chosen & (incoming != 0)]
        scale = float(meant.median()) if len(meant) else 0.0
        rest = incoming - scale * done.chosen
        if int(rest.count_nonzero()) >= int(incoming.count_nonzero()):
            self.add(rows, lse, incoming)
            return
        self.hidden = done.hidden.mul_(incoming[:, None])
        self.weight.add(done.weight, scale)
        self.add(rows, lse, rest, has_hidden=done.chosen)

    def add(
        self,
        rows: _Rows,
        lse: Tensor,
        incoming: Tensor,
        kept: list[Tensor] | None = None,
        has_hidden: Tensor | None = None,
    ) -> None:
        """Compute what the rows with an incoming gradient contribute.

        Args:
            incoming: [N] fp32, weight of each row's loss.
            kept: the logits of all rows, if they were kept.
            has_hidden: [N] bool, rows whose hidden states have their gradient already.
        """
        places = incoming.nonzero().squeeze(1)
        if not len(places):
            return
        some, lse, factor = rows.select(places), lse[places], incoming[places]
        common = float(factor[0])
        uniform = bool((factor == common).all())
        in_place = has_hidden is None and self.hidden.dtype == torch.float32
        hidden = self.hidden[: len(places)] if in_place else torch.zeros_like(some.hidden, dtype=torch.float32)
        blocks = (some if kept is None else rows).vocabulary_blocks()
        memory = some.memory_of(blocks, len(some)) if kept is None else None
        for number, entries in enumerate(blocks):
            logits = some.logits(entries, out=memory) if kept is None else kept[number].index_select(0, places)
            change = some.math.gradient(logits, some.labels - entries.start, lse)
            if not uniform:
                change.mul_(factor[:, None])
            self.weight.add_product(entries, change, some.hidden, common if uniform else 1.0)
            add_product(hidden, change, some.weight[entries], common if uniform else 1.0)
        if in_place:
            _spread(self.hidden, places)
            return
        new = slice(None) if has_hidden is None else ~has_hidden[places]
        self.hidden[places[new]] = hidden[new].to(self.hidden.dtype)


def _spread(rows: Tensor, places: Tensor) -> None:
    """Move the leading rows to ``places`` [p] int64, which ascend, in place, some at a time; 0 elsewhere."""
    # From the last to the first: a row's place is its number or more, so that none is written before it is read.
    for part in reversed(slices(len(places), SPREAD_ROWS)):
        rows[places[part]] = rows[part].clone()
    empty = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    empty[places] = False
    rows.masked_fill_(empty[:, None], 0.0)
