"""Chunked linear cross-entropy with at most one chunk of logits in memory.

Without gradients in the forward pass a chunk is all rows times a part of the vocabulary. The weight is then read
once and each part of its gradient is written once, also in the backward pass, in which the lse is known and chunks are
independent. With gradients in the forward pass, a chunk is some rows times the full shard, because gradients require
the lse first. Logits that are small enough are saved instead: that is as few FLOPs in larger matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.backward_rows import BackwardRows
from megatron_slm.objective.linear_cross_entropy.chunk_math import (
    ChunkMath,
    TorchChunkMath,
    aligned_width,
    largest,
    slices,
)
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.objective.linear_cross_entropy.product import add_product, fp32_product, product_dtype
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig, TokenLosses
from megatron_slm.objective.linear_cross_entropy.softmax import GradientFactors, SoftmaxNormalizer, Statistics
from megatron_slm.objective.linear_cross_entropy.weight_gradient import WeightGradient
from megatron_slm.objective.vocab_shard import VocabShard, gather_sequence, reduce_hidden_gradient
from megatron_slm.runtime.host_reads import row_indices

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}  # limited by CPU caches; large enough to saturate a GPU
SHARE_OF_LOGITS = 1 / 16  # no chunk of all rows is larger than this part of the logits
MIN_CHUNK_BYTES = 1 << 18  # whatever that part: smaller chunks save little memory and cost many calls
# Rows of a chunk with gradients in the forward pass, and the least number of chunks. Lower values save memory and cost
# time: each chunk reads the weight twice and rewrites its gradient (docs/performance.md).
FORWARD_GRAD_ROWS = {"cpu": 512, "cuda": 4096}
MIN_ROW_CHUNKS = {"cpu": 8, "cuda": 2}
MIN_ENTRIES = 64  # of a chunk of all rows, whatever their number
WIDTH_MULTIPLE = 256  # of the entries of a larger chunk, so that matrix products have full tiles
FIXED_SIZE = {"cpu": False, "cuda": True}  # whether the host chooses rows without waiting for their number
SPREAD_ROWS = 256  # moved at a time
LOGIT_BYTES = 4  # logits are fp32 whatever the dtype of the weight
CONVERTED_BYTES = 8 << 20  # fp32 copies of a bf16 weight on a CPU, at a time


def chunked_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    config: LinearCrossEntropyConfig,
    shard: VocabShard,
    forward_grad: ForwardGradPolicy | None,
    with_entropy: bool,
    needs_gradient: bool,
) -> TokenLosses:
    """Return token losses and entropies, [s, b] each, as :func:`linear_cross_entropy` describes them."""
    rows = BackwardRows(config.host_reads) if needs_gradient else None
    loss, entropy = _ChunkedLoss.apply(hidden, weight, labels, config, shard, forward_grad, with_entropy, rows)
    return TokenLosses(loss, entropy, rows)


def chunk_math(config: LinearCrossEntropyConfig, dtype: torch.dtype) -> ChunkMath:
    """Return the arithmetic for matrix products in ``dtype``; Triton is imported only if it is used."""
    if config.implementation == "triton":
        from megatron_slm.objective.linear_cross_entropy.triton_math import TritonChunkMath

        return TritonChunkMath(config.softcap, dtype)
    return TorchChunkMath(config.softcap, dtype)


@dataclass
class _HeadInputs:
    """Rows of hidden states at a vocabulary shard of the LM head, and the chunks of their logits."""

    hidden: Tensor  # [n, h], in the dtype of the matrix products
    weight: Tensor  # [V / tp, h], detached, in its dtype
    labels: Tensor  # [n], counted from the first entry of the shard
    config: LinearCrossEntropyConfig
    shard: VocabShard
    math: ChunkMath
    chunk_bytes: int  # most that a chunk of all rows may take

    def __len__(self) -> int:
        return self.hidden.size(0)

    def select(self, row_indices: Tensor) -> _HeadInputs:
        """Return the given rows, [p] int64."""
        return replace(self, hidden=self.hidden[row_indices], labels=self.labels[row_indices])

    def vocabulary_chunks(self) -> list[slice]:
        """Return slices of the unpadded entries; a chunk is all rows times a slice."""
        if not len(self):
            return []
        width = self.chunk_bytes // (LOGIT_BYTES * len(self))
        width -= width % (WIDTH_MULTIPLE if width >= WIDTH_MULTIPLE else MIN_ENTRIES)
        return slices(self.shard.unpadded_size, max(width, MIN_ENTRIES))

    def row_chunks(self) -> list[slice]:
        """Return slices of the rows; a chunk is a slice times the full shard."""
        device = self.hidden.device.type
        rows = FORWARD_GRAD_ROWS[device]
        row_bytes = LOGIT_BYTES * self.shard.size
        if self.config.chunk_bytes is not None:
            rows = self.config.chunk_bytes // row_bytes
        share = max(-(-len(self) // MIN_ROW_CHUNKS[device]), MIN_CHUNK_BYTES // row_bytes)
        return slices(len(self), max(min(rows, share), 1))

    def logits(self, entries: slice, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Return a chunk of logits in fp32 with aligned rows, in the memory ``out`` if it is given."""
        hidden, width = self.hidden[rows], entries.stop - entries.start
        size = len(hidden) * aligned_width(width)
        memory = self.memory(size) if out is None else out[:size]
        chunk = memory.view(len(hidden), aligned_width(width))[:, :width]
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

    def memory_for(self, rows: int, width: int) -> Tensor:
        """Return memory that a chunk of so many rows and entries fits in."""
        return self.memory(rows * aligned_width(width))

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
        shard: VocabShard,
        forward_grad: ForwardGradPolicy | None,
        with_entropy: bool,
        backward_rows: BackwardRows | None,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = _head_inputs(hidden, weight, labels, config, shard)
        fits = len(inputs) * shard.size * LOGIT_BYTES <= config.saved_logits_bytes
        saved_chunks: list[_SavedChunk] | None = [] if backward_rows is not None and fits else None
        forward_gradients: _ForwardGradients | None = None
        if forward_grad is not None and saved_chunks is None:
            statistics, forward_gradients = _forward_grad_pass(inputs, forward_grad, with_entropy)
            assert backward_rows is not None, "a policy is only used with gradients"
            backward_rows.chosen = forward_gradients.chosen
        else:
            statistics = _statistics(inputs, with_entropy, saved_chunks)
        ctx.save_for_backward(hidden, weight, labels, *statistics.normalizer)
        ctx.config, ctx.shard, ctx.backward_rows = config, shard, backward_rows
        ctx.saved_chunks, ctx.forward_gradients = saved_chunks, forward_gradients
        loss, entropy = statistics.loss.view(labels.shape), statistics.entropy
        if entropy is None:
            return loss, None
        entropy = entropy.view(labels.shape)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, highest, total = ctx.saved_tensors
        inputs = _head_inputs(hidden, weight, labels, ctx.config, ctx.shard)
        gradients = _Gradients(inputs, SoftmaxNormalizer(highest, total), WeightGradient(weight), ctx.backward_rows)
        loss_weight = grad_loss.reshape(-1).float()
        forward_gradients, ctx.forward_gradients = ctx.forward_gradients, None
        if forward_gradients is None:
            gradients.add(loss_weight, ctx.saved_chunks)
        else:
            gradients.correct(forward_gradients, loss_weight)
        ctx.saved_chunks = None
        all_tokens = gradients.hidden.to(hidden.dtype).view(*labels.shape, hidden.size(-1))
        hidden_gradient = reduce_hidden_gradient(all_tokens, ctx.config.tp_group, ctx.config.sequence_parallel)
        return hidden_gradient, gradients.weight.result(), None, None, None, None, None, None


def _head_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, config: LinearCrossEntropyConfig, shard: VocabShard
) -> _HeadInputs:
    all_tokens = gather_sequence(hidden.detach(), config.tp_group, config.sequence_parallel)
    flat = all_tokens.reshape(-1, all_tokens.size(-1))
    flat = flat.to(product_dtype(flat))
    math = chunk_math(config, flat.dtype)
    logits_bytes = LOGIT_BYTES * len(flat) * shard.size
    share = max(int(logits_bytes * SHARE_OF_LOGITS), MIN_CHUNK_BYTES)
    chunk_bytes = config.chunk_bytes or min(CHUNK_BYTES[hidden.device.type], share)
    return _HeadInputs(flat, weight.detach(), labels.reshape(-1) - shard.first, config, shard, math, chunk_bytes)


class _SavedChunk(NamedTuple):
    """Hold a chunk of all rows whose gradient is computed without its matrix product."""

    entries: slice  # of the vocabulary shard
    logits: Tensor  # [N, w], as :meth:`ChunkMath.statistics` left them
    highest: Tensor  # [N] fp32, largest logit of each row of the chunk


def _statistics(inputs: _HeadInputs, with_entropy: bool, saved_chunks: list[_SavedChunk] | None) -> Statistics:
    """Return the statistics of all rows over all shards, and append each chunk to ``saved_chunks`` if it is a list."""
    total = Statistics.empty(len(inputs), inputs.hidden.device, with_entropy)
    chunks = inputs.vocabulary_chunks()
    memory = inputs.memory_for(len(inputs), largest(chunks)) if saved_chunks is None else None
    for entries in chunks:
        logits = inputs.logits(entries, out=memory)
        labels = inputs.labels - entries.start
        part = inputs.math.statistics(logits, labels, with_entropy=with_entropy, keep=saved_chunks is not None)
        total.merge(part)
        if saved_chunks is not None:
            saved_chunks.append(_SavedChunk(entries, logits, part.highest))
    total.reduce(inputs.shard.group)
    return total


@dataclass
class _ForwardGradients:
    """Gradients from the forward pass, computed before the selection was known."""

    chosen: Tensor  # [N] bool
    hidden: Tensor  # [N, h], gradient for loss weight 1; 0 if not chosen
    weight: Tensor  # [V / tp, h] fp32, the same


def _forward_grad_pass(
    inputs: _HeadInputs, forward_grad: ForwardGradPolicy, with_entropy: bool
) -> tuple[Statistics, _ForwardGradients]:
    """Return the statistics of all rows, and the gradients of those that ``forward_grad`` chooses."""
    unpadded = slice(0, inputs.shard.unpadded_size)
    gradients = _ForwardGradients(
        inputs.labels.new_zeros(len(inputs), dtype=torch.bool),
        torch.zeros_like(inputs.hidden),
        torch.zeros_like(inputs.weight, dtype=torch.float32),
    )
    chunks = inputs.row_chunks()
    memory = inputs.memory_for(largest(chunks), inputs.shard.unpadded_size)
    parts = [Statistics.empty(0, inputs.hidden.device, with_entropy)]
    for rows in chunks:
        logits = inputs.logits(unpadded, rows, memory)
        labels = inputs.labels[rows]
        part = Statistics.empty(len(labels), logits.device, with_entropy)
        if inputs.shard.unpadded_size:
            part = inputs.math.statistics(logits, labels, with_entropy=with_entropy, keep=True)
        saved_highest = part.highest
        part.reduce(inputs.shard.group)
        parts.append(part)
        indices, is_chosen = forward_grad.choose(rows, part.loss, fixed_size=FIXED_SIZE[logits.device.type])
        gradients.chosen[rows][indices] = is_chosen
        factors = GradientFactors.from_normalizer(
            part.normalizer.select(indices), is_chosen.float(), inputs.config.z_loss
        )
        change = inputs.math.picked_gradient(logits, indices, labels[indices], factors, saved_highest[indices])
        hidden = inputs.hidden.new_zeros(len(indices), inputs.hidden.size(1), dtype=torch.float32)
        inputs.add_hidden_gradient(hidden, change, unpadded)
        gradients.hidden[rows][indices] = hidden.to(gradients.hidden.dtype)
        add_product(gradients.weight[unpadded], change.t(), inputs.hidden[rows][indices])
    return Statistics.concat(parts), gradients


class _Gradients:
    """Gradients of hidden states [N, h] (for this vocabulary shard only) and weight, accumulated over chunks."""

    def __init__(
        self, inputs: _HeadInputs, normalizer: SoftmaxNormalizer, weight: WeightGradient, rows: BackwardRows
    ) -> None:
        self.inputs, self.normalizer, self.weight, self.rows = inputs, normalizer, weight, rows
        self.hidden = torch.zeros_like(inputs.hidden)

    def correct(self, forward: _ForwardGradients, loss_weight: Tensor) -> None:
        """Correct the gradients of the forward pass once the final selection is known.

        The residual of each row is computed (:class:`BackwardRows`). If more rows have one than are selected, it is
        cheaper, and more exact, to compute all selected rows.

        Args:
            forward: the gradients of the forward pass; their memory is reused.
            loss_weight: [N] fp32, weight of each row's loss.
        """
        scale, *sizes = self.rows.numbers(loss_weight)
        residual, missing = self.rows.residual, self.rows.missing
        assert residual is not None and missing is not None
        n_weighted, n_residual, n_missing = map(int, sizes)
        if n_residual >= n_weighted:
            self._add(row_indices(loss_weight, n_weighted), loss_weight)
            return
        self.hidden = forward.hidden.mul_(loss_weight[:, None])
        self.weight.add(forward.weight, scale)
        if n_residual:
            indices = row_indices(residual, n_residual)
            hidden = self._accumulate(indices, residual)
            missing_here = row_indices(missing[indices], n_missing)  # the hidden gradient of chosen rows is complete
            self.hidden[indices[missing_here]] = hidden[missing_here].to(self.hidden.dtype)

    def add(self, loss_weight: Tensor, saved_chunks: list[_SavedChunk] | None = None) -> None:
        """Compute the gradients of rows with a nonzero loss weight [N] fp32, from saved chunks if there are some."""
        (count,) = self.rows.numbers(loss_weight)
        self._add(row_indices(loss_weight, int(count)), loss_weight, saved_chunks)

    def _add(self, indices: Tensor, loss_weight: Tensor, saved_chunks: list[_SavedChunk] | None = None) -> None:
        if not len(indices):
            return
        if self.hidden.dtype == torch.float32:  # accumulated in the leading rows
            self._accumulate(indices, loss_weight, saved_chunks, self.hidden[: len(indices)])
            _spread(self.hidden, indices)
        else:
            self.hidden[indices] = self._accumulate(indices, loss_weight, saved_chunks).to(self.hidden.dtype)

    def _accumulate(
        self,
        indices: Tensor,
        loss_weight: Tensor,
        saved_chunks: list[_SavedChunk] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Add the gradient of the given rows to that of the weight; return that of their hidden states, [p, h] fp32.

        Args:
            hidden: zeros that it is added to; None allocates them.
        """
        selected = self.inputs.select(indices)
        if hidden is None:
            hidden = torch.zeros_like(selected.hidden, dtype=torch.float32)
        z_loss = self.inputs.config.z_loss
        factors = GradientFactors.from_normalizer(self.normalizer.select(indices), loss_weight[indices], z_loss)
        if saved_chunks is None:
            logit_gradients = _recomputed_logit_gradients(selected, factors)
        else:
            logit_gradients = _saved_logit_gradients(selected, factors, indices, saved_chunks)
        for entries, change in logit_gradients:
            self.weight.add_product(entries, change, selected.hidden)
            selected.add_hidden_gradient(hidden, change, entries)
        return hidden


def _recomputed_logit_gradients(selected: _HeadInputs, factors: GradientFactors) -> Iterator[tuple[slice, Tensor]]:
    """Yield the entries and the logit gradient of each chunk, which the next one overwrites."""
    chunks = selected.vocabulary_chunks()
    memory = selected.memory_for(len(selected), largest(chunks))
    for entries in chunks:
        logits = selected.logits(entries, out=memory)
        yield entries, selected.math.gradient(logits, selected.labels - entries.start, factors, None)


def _saved_logit_gradients(
    selected: _HeadInputs, factors: GradientFactors, indices: Tensor, saved_chunks: list[_SavedChunk]
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the entries and the logit gradient of the rows ``indices`` of each saved chunk."""
    for entries, logits, highest in saved_chunks:
        labels = selected.labels - entries.start
        yield entries, selected.math.picked_gradient(logits, indices, labels, factors, highest[indices])


def _spread(rows: Tensor, indices: Tensor) -> None:
    """Move the leading rows to ``indices`` [p] int64, which ascend, in place, some at a time; 0 elsewhere."""
    # From the last to the first: a row's index is its number or more, so that none is written before it is read.
    for part in reversed(slices(len(indices), SPREAD_ROWS)):
        rows[indices[part]] = rows[part].clone()
    empty = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    empty.index_fill_(0, indices, False)
    rows.masked_fill_(empty[:, None], 0.0)
