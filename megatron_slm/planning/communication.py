"""Messages and bytes that a rank sends per step, by purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_slm.config.selection import selects_tokens
from megatron_slm.model.size import projection_widths
from megatron_slm.planning.layout import Layout
from megatron_slm.planning.parameters import rank_parameters

# objective/selection/threshold.py: counts of 8 bytes for the digits of 11, 11 and 10 bits of a 32-bit key.
HISTOGRAM_BYTES = (8 << 11, 8 << 11, 8 << 10)
DIGITS_OF_TIES = 2  # a GPU always ranks the order of ties as well
HOP_SECONDS = 5e-6  # latency of one message between nodes: an assumption (docs/scaling.md)


@dataclass(frozen=True)
class Messages:
    """Represent the messages of one purpose: collective operations or sends of one rank in a step."""

    purpose: str
    operation: str
    group: int  # ranks
    count: int
    bytes: int  # of one message
    members: int  # ranks of the group that share a node

    @property
    def sent(self) -> float:
        """Return the bytes that a rank sends over its link in all messages, with ring algorithms."""
        if self.group < 2:
            return 0.0
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share}.get(self.operation, 1.0)
        return factor * self.bytes * self.count

    def seconds(self, layout: Layout) -> float:
        """Return the time of all messages at the bandwidth of the data sheet, without latency."""
        return self.sent / layout.device.bandwidth(self.group, self.members)


def step_messages(layout: Layout, stage: int = 0) -> list[Messages]:
    """Return the messages of a step on a rank of a stage; bytes of a collective are those of its full tensor."""
    found = [*_tensor(layout, stage), *_context(layout, stage), *_pipeline(layout), *_data(layout, stage)]
    found += _selection(layout)
    return [messages for messages in found if messages.group > 1 and messages.count and messages.bytes]


def node_members(layout: Layout, group: int, stride: int) -> int:
    """Return the ranks of a group that share a node; consecutive ranks of the group differ by ``stride``."""
    return min(max(layout.device.per_node // stride, 1), group)


def forward_passes(layout: Layout) -> float:
    """Return the number of forward passes of a micro-batch through the layers, in passes of the training model."""
    passes = 1.0 + layout.ranks_globally + (layout.config.training.recompute_granularity == "full")
    layers = sum(reference.config.model.num_layers for reference in layout.references())
    return passes + layers / layout.config.model.num_layers


def _tensor(layout: Layout, stage: int) -> Iterator[Messages]:
    """Yield tensor-parallel messages: two per layer and pass, and with sequence parallelism as two halves each."""
    size = layout.tokens * layout.config.model.hidden_size * layout.value_bytes
    passes = layout.stage_layers(stage) * layout.micro_batches
    forward, members = int(2 * passes * forward_passes(layout)), node_members(layout, layout.tensor, 1)
    purpose = "tensor parallelism"
    if layout.config.parallel.sequence_parallel:
        gathers = forward + 2 * 2 * passes  # the backward pass also gathers the inputs of linear layers again
        yield Messages(purpose, "all-gather", layout.tensor, gathers, size, members)
        yield Messages(purpose, "reduce-scatter", layout.tensor, forward + 2 * passes, size, members)
    else:
        yield Messages(purpose, "all-reduce", layout.tensor, forward + 2 * passes, size, members)


def _context(layout: Layout, stage: int) -> Iterator[Messages]:
    """Yield the exchange of keys and values in each layer's forward pass, and of both and their gradients after it."""
    _, key = projection_widths(layout.config.model)
    size = 2 * layout.tokens * layout.context * max(key // layout.tensor, 1) * layout.value_bytes
    passes = layout.stage_layers(stage) * layout.micro_batches
    members = node_members(layout, layout.context, layout.tensor)
    count = int(passes * (forward_passes(layout) + 2))
    yield Messages("context parallelism", "all-gather", layout.context, count, size, members)


def _pipeline(layout: Layout) -> Iterator[Messages]:
    """Yield activations and gradients between stages."""
    size = layout.shard_tokens * layout.config.model.hidden_size * layout.value_bytes
    passes = 2 + int(layout.ranks_globally) + int(layout.has_replica)
    count = passes * layout.micro_batches * layout.virtual
    yield Messages("pipeline", "send", layout.pipeline, count, size, 1)


def _data(layout: Layout, stage: int) -> Iterator[Messages]:
    """Yield the reduction of gradients and the gathering of updated weights."""
    config, replicas = layout.config, layout.data * layout.context
    parameters, expert = rank_parameters(layout, stage), config.parallel.expert_model_parallel_size
    gradient = 4 if config.optimizer.accumulate_allreduce_grads_in_fp32 else layout.value_bytes
    weight = 1 if config.precision.fp8_param_gather else layout.value_bytes
    for count, group, stride in (
        (parameters.dense, replicas, layout.tensor),
        (parameters.experts, replicas // expert, layout.tensor * expert),
    ):
        members = node_members(layout, group, stride)
        if config.parallel.use_distributed_optimizer:
            yield Messages("gradients", "reduce-scatter", group, 1, gradient * count, members)
            yield Messages("weights", "all-gather", group, 1, weight * count, members)
        else:
            yield Messages("gradients", "all-reduce", group, 1, gradient * count, members)


def _selection(layout: Layout) -> Iterator[Messages]:
    """Yield the all-reduced histograms of the threshold."""
    group, rankings = ranking_group(layout), rankings_per_step(layout)
    rounds = DIGITS_OF_TIES if layout.device.is_gpu else 1
    members = node_members(layout, group, layout.tensor)
    for size in sorted(set(HISTOGRAM_BYTES)):
        count = rankings * rounds * HISTOGRAM_BYTES.count(size)
        yield Messages("threshold", "all-reduce", group, count, size, members)
    yield Messages("threshold", "all-reduce", group, rankings, 8, members)  # number of valid tokens


def ranking_group(layout: Layout) -> int:
    """Return the number of ranks that rank their tokens together."""
    scope = layout.config.objective.slm_scope
    if not selects_tokens(layout.config):
        return 1
    return layout.data * layout.context if scope in ("data-parallel", "global-batch") else layout.context


def rankings_per_step(layout: Layout) -> int:
    """Return the number of rankings in a step: one per micro-batch, or one of the global batch."""
    if not selects_tokens(layout.config):
        return 0
    return 1 if layout.config.objective.slm_scope == "global-batch" else layout.micro_batches


def threshold_seconds(layout: Layout) -> float:
    """Return the time of the threshold's all-reduces in a step: a tree of messages, and bytes on the network."""
    group = ranking_group(layout)
    if group < 2:
        return 0.0
    hops = 2 * max((group - 1).bit_length(), 1)
    rounds = rankings_per_step(layout) * (3 * (DIGITS_OF_TIES if layout.device.is_gpu else 1) + 1)
    sent = sum(messages.seconds(layout) for messages in _selection(layout))
    return rounds * hops * HOP_SECONDS + sent
