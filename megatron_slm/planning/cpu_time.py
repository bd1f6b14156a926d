"""Time of a step on CPUs: matrix products and attention at measured rates, other operations at the memory's rate.

The rates are measured on this machine at the shapes of the plan, and not taken from a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_slm.config.activation import is_gated
from megatron_slm.planning.activations import Widths
from megatron_slm.planning.head import FP32, MIB, SAVED_LOGITS_MB, chunk_width
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.parameters import rank_parameters
from megatron_slm.planning.step_time import StepTime

# Values that elementwise operations read or write per channel, forward and backward, counted in the implementations.
NORM = (7, 16)  # of the hidden size, per norm
ROTARY = (12, 14)  # of queries and keys
ATTENTION_COPIES = (4, 4)  # of the queries: layouts of attention's input and output
RESIDUAL = (6, 6)  # of the hidden size
GATED = (7, 13)  # of the MLP's width
UNGATED = (2, 3)
ADAM = 26  # of the parameters: norm and clipping of gradients, moments, weight decay, update
ACCUMULATION = 3  # of the gradients: addition to the gradient buffer
EMBEDDING = 2  # of the embedding: its dense gradient


class Rates(Protocol):
    """Times of operations on this machine, in seconds of one thread."""

    def product(self, rows: int, inner: int, columns: int) -> float:
        """Return the time of the product of a [rows, inner] and a [inner, columns] matrix."""
        ...

    def attention(self, batch: int, heads: int, length: int, size: int) -> tuple[float, float]:
        """Return the times of causal attention, forward and backward."""
        ...

    def elementwise(self, values: float) -> float:
        """Return the time of reading or writing so many fp32 values in elementwise operations."""
        ...

    def statistics(self, rows: int, width: int) -> float:
        """Return the time of the softmax statistics of a chunk of logits, with the operations on its rows."""
        ...

    def gradient(self, rows: int, width: int) -> float:
        """Return the time of the gradient of a chunk of logits whose exponentials were saved."""
        ...


@dataclass(frozen=True)
class Passes:
    """Hold the seconds of the forward and the backward pass of one micro-batch."""

    forward: float
    backward: float
    scoring: float  # forward pass without gradients, of the ranking pass and the reference model


def cpu_step_time(layout: Layout, rates: Rates) -> StepTime:
    """Return the time of a step on the slowest stage; communication between processes of one machine is not counted."""
    stages = [_stage(layout, rates, stage) for stage in range(layout.pipeline)]
    slowest = max(stages, key=lambda passes: passes.forward + passes.backward)
    count, fill = layout.micro_batches, (layout.pipeline - 1) / layout.virtual
    is_full = layout.config.training.recompute_granularity == "full"
    recomputed = slowest.forward if is_full else 0.0
    reference = count * sum(
        max(_stage(frozen, rates, stage).scoring for stage in range(layout.pipeline)) for frozen in layout.references()
    )
    return StepTime(
        compute=count * (slowest.forward + slowest.backward),
        recomputation=count * recomputed,
        bubble=fill * (slowest.forward + slowest.backward + recomputed),
        reference=reference,
        ranking=count * slowest.scoring if layout.ranks_globally else 0.0,
        tensor=0.0,
        context=0.0,
        pipeline=0.0,
        data=0.0,
        threshold=0.0,
        optimizer=_update(layout, rates),
    )


def _stage(layout: Layout, rates: Rates, stage: int) -> Passes:
    layers = layout.stage_layers(stage)
    one = _layer(layout, rates)
    forward, backward = layers * one.forward, layers * one.backward
    model, parameters = layout.config.model, rank_parameters(layout, stage)
    backward += rates.elementwise(ACCUMULATION * parameters.total)
    if stage == 0:
        backward += rates.elementwise(EMBEDDING * layout.padded_vocab // layout.tensor * model.hidden_size)
    if stage == layout.pipeline - 1:
        head = _head(layout, rates)
        return Passes(forward + head.forward, backward + head.backward, forward + head.scoring)
    return Passes(forward, backward, forward)


def _layer(layout: Layout, rates: Rates) -> Passes:
    """Return the time of one layer."""
    model, widths, tokens = layout.config.model, Widths.of(layout), layout.tokens
    share = layout.selected_share if layout.config.objective.slm_backward == "filtered" else 1.0
    forward = backward = 0.0
    qkv = widths.query + 2 * widths.key
    for inner, columns, filtered in (
        (widths.hidden, qkv, False),
        (widths.query, widths.hidden, True),
        (widths.hidden, widths.gates * widths.mlp, True),
        (widths.mlp, widths.hidden, True),
    ):
        rows = int(tokens * (share if filtered else 1.0))
        forward += rates.product(tokens, inner, columns)
        backward += rates.product(rows, columns, inner) + rates.product(columns, rows, inner)
    samples = layout.config.training.micro_batch_size
    heads = model.num_attention_heads // layout.tensor
    attention = rates.attention(samples, heads, model.seq_length, model.kv_channels)
    forward, backward = forward + attention[0] / layout.context, backward + attention[1] / layout.context
    rotated = widths.query + widths.key if model.position_embedding_type == "rope" else 0
    gate = GATED if is_gated(model) else UNGATED
    for (first, second), width in (
        (NORM, 2 * widths.hidden),
        (ROTARY, rotated),
        (ATTENTION_COPIES, widths.query),
        (RESIDUAL, widths.hidden),
        (gate, widths.mlp),
    ):
        forward += rates.elementwise(first * tokens * width)
        backward += rates.elementwise(second * tokens * width)
    return Passes(forward, backward, forward)


def _head(layout: Layout, rates: Rates) -> Passes:
    """Return the time of the LM head; its backward pass computes selected rows, whose logits may have been saved.

    Logits are computed in chunks of all rows, each with operations on its rows, which take time in small models.
    """
    tokens, hidden = layout.tokens, layout.config.model.hidden_size
    vocabulary = layout.padded_vocab // layout.tensor
    rows = int(layout.selected_share * tokens)
    limit = layout.config.objective.slm_saved_logits_mb
    saved = FP32 * tokens * vocabulary <= (SAVED_LOGITS_MB["cpu"] if limit is None else limit) * MIB
    logits = _chunks(layout, rates, tokens)
    width = chunk_width(layout, tokens if saved else rows)
    products = rates.product(rows, width, hidden) + rates.product(width, rows, hidden)
    gradient = vocabulary / width * (products + rates.gradient(rows, width))
    if layout.computes_gradient_in_forward and not saved:
        return Passes(logits + gradient, 0.0, logits)
    again = rates.elementwise(2 * rows * vocabulary) if saved else _chunks(layout, rates, rows)
    return Passes(logits, gradient + again, logits)


def _chunks(layout: Layout, rates: Rates, rows: int) -> float:
    """Return the time of the logits of some rows and their statistics."""
    width, vocabulary = chunk_width(layout, rows), layout.padded_vocab // layout.tensor
    product = rates.product(rows, layout.config.model.hidden_size, width)
    return vocabulary / width * (product + rates.statistics(rows, width))


def _update(layout: Layout, rates: Rates) -> float:
    """Return the time of the optimizer."""
    replicas = layout.data * layout.context if layout.config.parallel.use_distributed_optimizer else 1
    count = max(rank_parameters(layout, stage).total for stage in range(layout.pipeline))
    return rates.elementwise(ADAM * count / replicas)
