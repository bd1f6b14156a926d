"""Linear cross-entropy block by block: at no time is there more than one block of logits.

Without early tokens a block is all rows times a part of the vocabulary. So the weight is read once and each part of
its gradient is written once, in the backward pass as well, where the lse is known and blocks need nothing from each
other. With early tokens a block is some rows times the whole shard, because their gradient needs the lse first. Where
the logits are small enough to be kept, they are, and nothing is early: that is as few FLOPs in larger matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.blocks import BlockMath, TorchBlocks, slices
from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.linear_cross_entropy.head import LMHead
from megatron_slm.objective.linear_cross_entropy.product import add_product, fp32_product, product_dtype
from megatron_slm.objective.linear_cross_entropy.shard import (
    GradientRows,
    Partition,
    Shard,
    Statistics,
    gather_sequence,
    reduce_hidden_gradient,
)
from megatron_slm.objective.linear_cross_entropy.weight_gradient import WeightGradient

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # what fits the caches of a CPU; what keeps a GPU busy
SHARE_OF_LOGITS = 1 / 16  # no block of all rows is larger than this part of the logits
# Rows of a block of early tokens, and how many blocks there are at least. Each block reads the weight twice and
# rewrites its gradient, which by count takes 41 ÷ rows of the matrix products' time on two CPU cores (170 GFLOP/s,
# 15 GB/s) and 580 ÷ rows on an H100 in bf16 (700 TFLOP/s, 3.3 TB/s): what saves memory here costs time.
EARLY_ROWS = {"cpu": 512, "cuda": 4096}
MIN_ROW_BLOCKS = {"cpu": 8, "cuda": 2}
MIN_ENTRIES = 64  # of a block of all rows, whatever their number
SPREAD_ROWS = 256  # moved at a time
LOGIT_BYTES = 4  # logits are fp32 whatever the dtype of the weight
CONVERTED_BYTES = 8 << 20  # fp32 copies of a bf16 weight on a CPU, at a time


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


def block_math(head: LMHead, dtype: torch.dtype) -> BlockMath:
    """Return the arithmetic of the engine for matrix products in ``dtype``; Triton is imported only if it is used."""
    if head.engine == "triton":
        from megatron_slm.objective.linear_cross_entropy.triton_blocks import TritonBlocks

        return TritonBlocks(head.softcap, dtype)
    return TorchBlocks(head.softcap, dtype)


@dataclass
class _Rows:
    """Rows of hidden states before a vocabulary shard, and the blocks that their logits are computed in."""

    hidden: Tensor  # [n, h], in the dtype of the matrix products
    weight: Tensor  # [V / tp, h], detached, in its dtype
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
        return slices(self.shard.real, max(self.block_bytes // (LOGIT_BYTES * len(self)), MIN_ENTRIES))

    def row_blocks(self) -> list[slice]:
        """Parts of the rows; the whole shard before one makes a block."""
        device = self.hidden.device.type
        rows = EARLY_ROWS[device]
        if self.head.block_bytes is not None:
            rows = self.head.block_bytes // (LOGIT_BYTES * self.shard.size)
        return slices(len(self), max(min(rows, -(-len(self) // MIN_ROW_BLOCKS[device])), 1))

    def logits(self, entries: slice, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Return a block of logits in fp32, in the memory ``out`` if it is given."""
        hidden, width = self.hidden[rows], entries.stop - entries.start
        if out is None:
            out = self.memory(len(hidden) * width)
        block = out[: len(hidden) * width].view(len(hidden), width)
        for columns, weight in self._weight_parts(entries):
            fp32_product(hidden, weight.t(), out=block[:, columns])
        return block

    def add_hidden_gradient(self, total: Tensor, change: Tensor, entries: slice) -> None:
        """Add the gradient of logits, ``change`` [n, w], times the weight to ``total`` [n, h] fp32."""
        for columns, weight in self._weight_parts(entries):
            add_product(total, change[:, columns], weight)

    def memory(self, size: int) -> Tensor:
        """Return memory for so many logits."""
        return self.hidden.new_empty(size, dtype=torch.float32)

    def memory_of(self, blocks: list[slice], across: int) -> Tensor:
        """Return memory that the logits of each of these blocks fit in."""
        return self.memory(max((block.stop - block.start for block in blocks), default=0) * across)

    def _weight_parts(self, entries: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the weight's rows in the dtype of the products, and their columns in a block of logits."""
        width = entries.stop - entries.start
        converts = self.weight.dtype != self.hidden.dtype
        step = max(CONVERTED_BYTES // (LOGIT_BYTES * self.weight.size(1)), MIN_ENTRIES) if converts else max(width, 1)
        for columns in slices(width, step):
            part = self.weight[entries.start + columns.start : entries.start + columns.stop]
            yield columns, part.to(self.hidden.dtype)


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
        fits = len(rows) * shard.size * LOGIT_BYTES <= head.kept_bytes
        kept: list[_SavedBlock] | None = [] if needs_gradient and fits else None
        done: _EarlyWork | None = None
        if early is not None and kept is None:
            statistics, done = _early_pass(rows, early, with_entropy)
        else:
            statistics = _statistics(rows, with_entropy, kept)
        ctx.save_for_backward(hidden, weight, labels, *statistics.partition)
        ctx.head, ctx.shard, ctx.kept, ctx.done = head, shard, kept, done
        loss, entropy = statistics.loss.view(labels.shape), statistics.entropy
        if entropy is None:
            return loss, None
        entropy = entropy.view(labels.shape)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, highest, total = ctx.saved_tensors
        partition = Partition(highest, total)
        rows = _rows(hidden, weight, labels, ctx.head, ctx.shard)
        gradient = _Gradient(torch.zeros_like(rows.hidden), WeightGradient(weight))
        incoming = grad_loss.reshape(-1).float()
        done, ctx.done = ctx.done, None
        if done is None:
            gradient.add(rows, partition, incoming, ctx.kept)
        else:
            gradient.finish(rows, partition, incoming, done)
        ctx.kept = None
        whole = gradient.hidden.to(hidden.dtype).view(*labels.shape, hidden.size(-1))
        part = reduce_hidden_gradient(whole, ctx.head.group, ctx.head.sequence_parallel)
        return part, gradient.weight.result(), None, None, None, None, None, None


def _rows(hidden: Tensor, weight: Tensor, labels: Tensor, head: LMHead, shard: Shard) -> _Rows:
    whole = gather_sequence(hidden.detach(), head.group, head.sequence_parallel)
    flat = whole.reshape(-1, whole.size(-1))
    flat = flat.to(product_dtype(flat))
    math = block_math(head, flat.dtype)
    whole_bytes = LOGIT_BYTES * len(flat) * shard.size
    most = head.block_bytes or min(BLOCK_BYTES[hidden.device.type], int(whole_bytes * SHARE_OF_LOGITS))
    return _Rows(flat, weight.detach(), labels.reshape(-1) - shard.first, head, shard, math, most)


class _SavedBlock(NamedTuple):
    """A block of all rows whose gradient is computed without its matrix product."""

    logits: Tensor  # [N, w], as the engine's statistics left them
    highest: Tensor  # [N] fp32, largest logit of each row of the block


def _statistics(rows: _Rows, with_entropy: bool, kept: list[_SavedBlock] | None) -> Statistics:
    """Return the statistics of all rows over all shards, and append each block to ``kept`` if it is a list."""
    total = Statistics.empty(len(rows), rows.hidden.device, with_entropy)
    blocks = rows.vocabulary_blocks()
    memory = rows.memory_of(blocks, len(rows)) if kept is None else None
    for entries in blocks:
        logits = rows.logits(entries, out=memory)
        labels = rows.labels - entries.start
        part = rows.math.statistics(logits, labels, with_entropy=with_entropy, keep=kept is not None)
        total.merge(part)
        if kept is not None:
            kept.append(_SavedBlock(logits, part.highest))
    total.reduce(rows.shard.group)
    return total


@dataclass
class _EarlyWork:
    """What was done before the selection was known."""

    chosen: Tensor  # [N] bool
    hidden: Tensor  # [N, h], gradient for weight 1; 0 where not chosen
    weight: Tensor  # [V / tp, h] fp32, the same


def _early_pass(rows: _Rows, early: EarlySelection, with_entropy: bool) -> tuple[Statistics, _EarlyWork]:
    """Figures of all rows, and the gradients of those that ``early`` chooses, in one pass over blocks of rows."""
    real = slice(0, rows.shard.real)
    done = _EarlyWork(
        rows.labels.new_zeros(len(rows), dtype=torch.bool),
        torch.zeros_like(rows.hidden),
        torch.zeros_like(rows.weight, dtype=torch.float32),
    )
    blocks = rows.row_blocks()
    memory = rows.memory_of(blocks, rows.shard.real)
    parts = [Statistics.empty(0, rows.hidden.device, with_entropy)]
    for block in blocks:
        logits = rows.logits(real, block, memory)
        labels = rows.labels[block]
        part = Statistics.empty(len(labels), logits.device, with_entropy)
        if rows.shard.real:
            part = rows.math.statistics(logits, labels, with_entropy=with_entropy, keep=True)
        saved = part.highest
        part.reduce(rows.shard.group)
        parts.append(part)
        chosen = early.chosen(block, part.loss)
        done.chosen[block] = chosen
        places = chosen.nonzero().squeeze(1)
        partition = part.partition.select(places)
        factors = GradientRows.of(partition, torch.ones_like(partition.total), rows.head.z_loss)
        change = rows.math.picked_gradient(logits, places, labels[places], factors, saved[places])
        hidden = rows.hidden.new_zeros(len(places), rows.hidden.size(1), dtype=torch.float32)
        rows.add_hidden_gradient(hidden, change, real)
        done.hidden[block][places] = hidden.to(done.hidden.dtype)
        add_product(done.weight[real], change.t(), rows.hidden[block][places])
    return Statistics.joined(parts), done


@dataclass
class _Gradient:
    """The gradients of hidden states [N, h] (of this vocabulary shard alone) and of the weight."""

    hidden: Tensor
    weight: WeightGradient

    def finish(self, rows: _Rows, partition: Partition, incoming: Tensor, done: _EarlyWork) -> None:
        """Make early work right: scale it, compute what is missing, take away what was too much.

        Where more rows are wrong than are selected at all, it is cheaper, and more exact, to begin anew.
        """
        meant = incoming[done.chosen & (incoming != 0)]
        scale = float(meant.median()) if len(meant) else 0.0
        rest = incoming - scale * done.chosen
        if int(rest.count_nonzero()) >= int(incoming.count_nonzero()):
            self.add(rows, partition, incoming)
            return
        self.hidden = done.hidden.mul_(incoming[:, None])
        self.weight.add(done.weight, scale)
        self.add(rows, partition, rest, has_hidden=done.chosen)

    def add(
        self,
        rows: _Rows,
        partition: Partition,
        incoming: Tensor,
        kept: list[_SavedBlock] | None = None,
        has_hidden: Tensor | None = None,
    ) -> None:
        """Compute what the rows with an incoming gradient contribute.

        Args:
            incoming: [N] fp32, weight of each row's loss.
            kept: the blocks of all rows, if they were kept.
            has_hidden: [N] bool, rows whose hidden states have their gradient already.
        """
        places = incoming.nonzero().squeeze(1)
        if not len(places):
            return
        some = rows.select(places)
        factors = GradientRows.of(partition.select(places), incoming[places], rows.head.z_loss)
        in_place = has_hidden is None and self.hidden.dtype == torch.float32
        hidden = self.hidden[: len(places)] if in_place else torch.zeros_like(some.hidden, dtype=torch.float32)
        blocks = (some if kept is None else rows).vocabulary_blocks()
        memory = some.memory_of(blocks, len(some)) if kept is None else None
        for number, entries in enumerate(blocks):
            if kept is None:
                logits, saved = some.logits(entries, out=memory), None
            else:
                logits, saved = (values[places] for values in kept[number])
            change = some.math.gradient(logits, some.labels - entries.start, factors, saved)
            self.weight.add_product(entries, change, some.hidden)
            some.add_hidden_gradient(hidden, change, entries)
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
