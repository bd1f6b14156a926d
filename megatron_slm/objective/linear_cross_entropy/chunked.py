"""Chunked linear cross-entropy with at most one chunk of logits in memory.

Without gradients in the forward pass a chunk is all rows times a part of the vocabulary. The weight is then read
once and each part of its gradient is written once, also in the backward pass, in which the lse is known and chunks are
independent. With gradients in the forward pass, a chunk is some rows times the full shard, because gradients require
the lse first. Logits that are small enough are saved instead: that is as few FLOPs in larger matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.chunk_math import ChunkMath, TorchChunkMath, slices
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.objective.linear_cross_entropy.product import add_product, fp32_product, product_dtype
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.objective.linear_cross_entropy.vocab_shard import (
    GradientRows,
    Partition,
    Shard,
    Statistics,
    gather_sequence,
    reduce_hidden_gradient,
)
from megatron_slm.objective.linear_cross_entropy.weight_gradient import WeightGradient

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # limited by CPU caches; large enough to saturate a GPU
SHARE_OF_LOGITS = 1 / 16  # no chunk of all rows is larger than this part of the logits
# Rows of a chunk with gradients in the forward pass, and the least number of chunks. Each reads the weight twice and
# rewrites its gradient, which by count takes 41 ÷ rows of the matrix products' time on two CPU cores (170 GFLOP/s,
# 15 GB/s) and 580 ÷ rows on an H100 in bf16 (700 TFLOP/s, 3.3 TB/s): lower values save memory and cost time.
FORWARD_GRAD_ROWS = {"cpu": 512, "cuda": 4096}
MIN_ROW_CHUNKS = {"cpu": 8, "cuda": 2}
MIN_ENTRIES = 64  # of a chunk of all rows, whatever their number
SPREAD_ROWS = 256  # moved at a time
LOGIT_BYTES = 4  # logits are fp32 whatever the dtype of the weight
CONVERTED_BYTES = 8 << 20  # fp32 copies of a bf16 weight on a CPU, at a time


def chunked_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: LinearCrossEntropyConfig,
    shard: Shard,
    forward_grad: ForwardGradPolicy | None,
    with_entropy: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return token losses and entropies, [s, b] each, as :func:`linear_cross_entropy` describes them."""
    loss, entropy = _ChunkedLoss.apply(
        hidden, weight, labels, config, shard, forward_grad, with_entropy, needs_gradient
    )
    return loss, entropy


def chunk_math(config: LinearCrossEntropyConfig, dtype: torch.dtype) -> ChunkMath:
    """Return the arithmetic for matrix products in ``dtype``; Triton is imported only if it is used."""
    if config.implementation == "triton":
        from megatron_slm.objective.linear_cross_entropy.triton_math import TritonChunkMath

        return TritonChunkMath(config.softcap, dtype)
    return TorchChunkMath(config.softcap, dtype)


@dataclass
class _Rows:
    """Rows of hidden states before a vocabulary shard, and the chunks that their logits are computed in."""

    hidden: Tensor  # [n, h], in the dtype of the matrix products
    weight: Tensor  # [V / tp, h], detached, in its dtype
    labels: Tensor  # [n], counted from the first entry of the shard
    config: LinearCrossEntropyConfig
    shard: Shard
    math: ChunkMath
    chunk_bytes: int  # most that a chunk of all rows may take

    def __len__(self) -> int:
        return self.hidden.size(0)

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(
            self.hidden[rows], self.weight, self.labels[rows], self.config, self.shard, self.math, self.chunk_bytes
        )

    def vocabulary_chunks(self) -> list[slice]:
        """Parts of the shard's real entries; all rows of one make a chunk."""
        if not len(self):
            return []
        return slices(self.shard.real, max(self.chunk_bytes // (LOGIT_BYTES * len(self)), MIN_ENTRIES))

    def row_chunks(self) -> list[slice]:
        """Row slices; a slice times the full shard is a chunk."""
        device = self.hidden.device.type
        rows = FORWARD_GRAD_ROWS[device]
        if self.config.chunk_bytes is not None:
            rows = self.config.chunk_bytes // (LOGIT_BYTES * self.shard.size)
        return slices(len(self), max(min(rows, -(-len(self) // MIN_ROW_CHUNKS[device])), 1))

    def logits(self, entries: slice, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Return a chunk of logits in fp32, in the memory ``out`` if it is given."""
        hidden, width = self.hidden[rows], entries.stop - entries.start
        if out is None:
            out = self.memory(len(hidden) * width)
        chunk = out[: len(hidden) * width].view(len(hidden), width)
        for columns, weight in self._weight_parts(entries):
            fp32_product(hidden, weight.t(), out=chunk[:, columns])
        return chunk

    def add_hidden_gradient(self, total: Tensor, change: Tensor, entries: slice) -> None:
        """Add the gradient of logits, ``change`` [n, w], times the weight to ``total`` [n, h] fp32."""
        for columns, weight in self._weight_parts(entries):
            add_product(total, change[:, columns], weight)

    def memory(self, size: int) -> Tensor:
        """Return memory for so many logits."""
        return self.hidden.new_empty(size, dtype=torch.float32)

    def memory_of(self, chunks: list[slice], across: int) -> Tensor:
        """Return memory that the logits of each of these chunks fit in."""
        return self.memory(max((chunk.stop - chunk.start for chunk in chunks), default=0) * across)

    def _weight_parts(self, entries: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the weight's rows in the dtype of the products, and their columns in a chunk of logits."""
        width = entries.stop - entries.start
        converts = self.weight.dtype != self.hidden.dtype
        step = max(CONVERTED_BYTES // (LOGIT_BYTES * self.weight.size(1)), MIN_ENTRIES) if converts else max(width, 1)
        for columns in slices(width, step):
            part = self.weight[entries.start + columns.start : entries.start + columns.stop]
            yield columns, part.to(self.hidden.dtype)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        config: LinearCrossEntropyConfig,
        shard: Shard,
        forward_grad: ForwardGradPolicy | None,
        with_entropy: bool,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = _rows(hidden, weight, labels, config, shard)
        fits = len(rows) * shard.size * LOGIT_BYTES <= config.saved_logits_bytes
        saved_chunks: list[_SavedChunk] | None = [] if needs_gradient and fits else None
        done: _ForwardWork | None = None
        if forward_grad is not None and saved_chunks is None:
            statistics, done = _forward_grad_pass(rows, forward_grad, with_entropy)
        else:
            statistics = _statistics(rows, with_entropy, saved_chunks)
        ctx.save_for_backward(hidden, weight, labels, *statistics.partition)
        ctx.config, ctx.shard, ctx.saved_chunks, ctx.done = config, shard, saved_chunks, done
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
        rows = _rows(hidden, weight, labels, ctx.config, ctx.shard)
        gradient = _Gradient(torch.zeros_like(rows.hidden), WeightGradient(weight))
        incoming = grad_loss.reshape(-1).float()
        done, ctx.done = ctx.done, None
        if done is None:
            gradient.add(rows, partition, incoming, ctx.saved_chunks)
        else:
            gradient.finish(rows, partition, incoming, done)
        ctx.saved_chunks = None
        whole = gradient.hidden.to(hidden.dtype).view(*labels.shape, hidden.size(-1))
        part = reduce_hidden_gradient(whole, ctx.config.tp_group, ctx.config.sequence_parallel)
        return part, gradient.weight.result(), None, None, None, None, None, None


def _rows(hidden: Tensor, weight: Tensor, labels: Tensor, config: LinearCrossEntropyConfig, shard: Shard) -> _Rows:
    whole = gather_sequence(hidden.detach(), config.tp_group, config.sequence_parallel)
    flat = whole.reshape(-1, whole.size(-1))
    flat = flat.to(product_dtype(flat))
    math = chunk_math(config, flat.dtype)
    whole_bytes = LOGIT_BYTES * len(flat) * shard.size
    most = config.chunk_bytes or min(CHUNK_BYTES[hidden.device.type], int(whole_bytes * SHARE_OF_LOGITS))
    return _Rows(flat, weight.detach(), labels.reshape(-1) - shard.first, config, shard, math, most)


class _SavedChunk(NamedTuple):
    """A chunk of all rows whose gradient is computed without its matrix product."""

    logits: Tensor  # [N, w], as the implementation's statistics left them
    highest: Tensor  # [N] fp32, largest logit of each row of the chunk


def _statistics(rows: _Rows, with_entropy: bool, saved_chunks: list[_SavedChunk] | None) -> Statistics:
    """Return the statistics of all rows over all shards, and append each chunk to ``saved_chunks`` if it is a list."""
    total = Statistics.empty(len(rows), rows.hidden.device, with_entropy)
    chunks = rows.vocabulary_chunks()
    memory = rows.memory_of(chunks, len(rows)) if saved_chunks is None else None
    for entries in chunks:
        logits = rows.logits(entries, out=memory)
        labels = rows.labels - entries.start
        part = rows.math.statistics(logits, labels, with_entropy=with_entropy, keep=saved_chunks is not None)
        total.merge(part)
        if saved_chunks is not None:
            saved_chunks.append(_SavedChunk(logits, part.highest))
    total.reduce(rows.shard.group)
    return total


@dataclass
class _ForwardWork:
    """Gradients from the forward pass, computed before the selection was known."""

    chosen: Tensor  # [N] bool
    hidden: Tensor  # [N, h], gradient for weight 1; 0 if not chosen
    weight: Tensor  # [V / tp, h] fp32, the same


def _forward_grad_pass(
    rows: _Rows, forward_grad: ForwardGradPolicy, with_entropy: bool
) -> tuple[Statistics, _ForwardWork]:
    """Return the statistics of all rows, and the gradients of those that ``forward_grad`` chooses."""
    real = slice(0, rows.shard.real)
    done = _ForwardWork(
        rows.labels.new_zeros(len(rows), dtype=torch.bool),
        torch.zeros_like(rows.hidden),
        torch.zeros_like(rows.weight, dtype=torch.float32),
    )
    chunks = rows.row_chunks()
    memory = rows.memory_of(chunks, rows.shard.real)
    parts = [Statistics.empty(0, rows.hidden.device, with_entropy)]
    for chunk in chunks:
        logits = rows.logits(real, chunk, memory)
        labels = rows.labels[chunk]
        part = Statistics.empty(len(labels), logits.device, with_entropy)
        if rows.shard.real:
            part = rows.math.statistics(logits, labels, with_entropy=with_entropy, keep=True)
        saved = part.highest
        part.reduce(rows.shard.group)
        parts.append(part)
        chosen = forward_grad.chosen(chunk, part.loss)
        done.chosen[chunk] = chosen
        places = chosen.nonzero().squeeze(1)
        partition = part.partition.select(places)
        factors = GradientRows.of(partition, torch.ones_like(partition.total), rows.config.z_loss)
        change = rows.math.picked_gradient(logits, places, labels[places], factors, saved[places])
        hidden = rows.hidden.new_zeros(len(places), rows.hidden.size(1), dtype=torch.float32)
        rows.add_hidden_gradient(hidden, change, real)
        done.hidden[chunk][places] = hidden.to(done.hidden.dtype)
        add_product(done.weight[real], change.t(), rows.hidden[chunk][places])
    return Statistics.joined(parts), done


@dataclass
class _Gradient:
    """Return the gradients of hidden states [N, h] (for this vocabulary shard only) and of the weight."""

    hidden: Tensor
    weight: WeightGradient

    def finish(self, rows: _Rows, partition: Partition, incoming: Tensor, done: _ForwardWork) -> None:
        """Correct the gradients of the forward pass once the final selection is known.

        If more rows are wrong than are selected, it is cheaper, and more exact, to compute all of them.
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
        saved_chunks: list[_SavedChunk] | None = None,
        has_hidden: Tensor | None = None,
    ) -> None:
        """Compute the gradients for rows with an incoming gradient.

        Args:
            incoming: [N] fp32, weight of each row's loss.
            saved_chunks: the chunks of all rows, if they were saved.
            has_hidden: [N] bool, rows whose hidden states have their gradient already.
        """
        places = incoming.nonzero().squeeze(1)
        if not len(places):
            return
        some = rows.select(places)
        factors = GradientRows.of(partition.select(places), incoming[places], rows.config.z_loss)
        in_place = has_hidden is None and self.hidden.dtype == torch.float32
        hidden = self.hidden[: len(places)] if in_place else torch.zeros_like(some.hidden, dtype=torch.float32)
        chunks = (some if saved_chunks is None else rows).vocabulary_chunks()
        memory = some.memory_of(chunks, len(some)) if saved_chunks is None else None
        for number, entries in enumerate(chunks):
            if saved_chunks is None:
                logits, saved = some.logits(entries, out=memory), None
            else:
                logits, saved = (values[places] for values in saved_chunks[number])
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
