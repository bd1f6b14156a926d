"""Activations that a transformer layer saves for its backward pass, by layer implementation.

Formulas count the tensors that the implementations save, each storage once. Those of the local layers are verified
against the allocator (tests/planning/test_measured_memory.py); those of Transformer Engine are read from its code.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.activation import activation_name, is_gated
from megatron_slm.model.size import projection_widths
from megatron_slm.planning.layout import VALUE_BYTES, Layout

FP32 = VALUE_BYTES["fp32"]


@dataclass(frozen=True)
class Widths:
    """Hold the channels per token on one rank."""

    hidden: int
    query: int
    key: int  # of keys, and of values
    mlp: int  # after the activation, over all experts of a token
    gates: int  # 2 if the MLP is gated, else 1

    @classmethod
    def of(cls, layout: Layout) -> Widths:
        """Return the widths of a layer."""
        model, tensor = layout.config.model, layout.tensor
        query, key = projection_widths(model)
        width = model.ffn_hidden_size
        if model.num_experts is not None:
            width = model.moe_ffn_hidden_size * model.moe_router_topk
        gates = 2 if is_gated(model) else 1
        return cls(model.hidden_size, query // tensor, max(key // tensor, model.kv_channels), width // tensor, gates)


def layer_bytes(layout: Layout) -> int:
    """Return the bytes that one layer saves per micro-batch without recomputation."""
    return _engine_layer(layout) if layout.uses_engine else _local_layer(layout)


def layer_input_bytes(layout: Layout) -> int:
    """Return the bytes of a layer's input."""
    return layout.shard_tokens * layout.config.model.hidden_size * layout.value_bytes


def _engine_layer(layout: Layout) -> int:
    """Count Transformer Engine's layer: fused norms, flash attention, fused rotary embedding and SwiGLU.

    Between tensor-parallel regions it saves the inputs of both norms and the inputs of both first linear layers; inside
    them the projected queries, keys and values, both again after the rotary embedding, the attention output, and the
    inputs of the activation and of the last linear layer. FP8 saves the inputs of linear layers in one byte, and that
    of the output projection in addition to the attention output.
    """
    model, widths, size = layout.config.model, Widths.of(layout), layout.value_bytes
    filtered = layout.config.objective.slm_backward == "filtered"
    saved = 1 if layout.precision == "fp8" else size
    rotated = widths.query + widths.key if model.position_embedding_type == "rope" else 0
    between = 2 * widths.hidden * (size + saved)
    attention = size * (2 * widths.query + 2 * widths.key + rotated) + (saved * widths.query if saved != size else 0)
    mlp = size * widths.gates * widths.mlp + (0 if filtered else saved * widths.mlp)
    dropout = 2 * widths.hidden if model.hidden_dropout else 0
    log_sum_exp = FP32 * model.num_attention_heads // layout.tensor
    return layout.shard_tokens * (between + dropout) + layout.tokens * (attention + mlp + log_sum_exp)


def _local_layer(layout: Layout) -> int:
    """Count the local layer: torch's norms, attention, rotary embedding and activation."""
    widths = Widths.of(layout)
    norms = 2 * _norm_values(layout)
    between = layout.shard_tokens * norms * widths.hidden * layout.value_bytes
    return between + _attention_bytes(layout, widths) + layout.tokens * _mlp_values(layout, widths) * layout.value_bytes


def _norm_values(layout: Layout) -> int:
    """Return the values of a norm per channel: input, normalized input (RMSNorm only) and output."""
    return 3 if layout.config.model.normalization == "RMSNorm" else 2


def _attention_bytes(layout: Layout, widths: Widths) -> int:
    """Count queries, keys and values, before and after the rotary embedding, the output, and cosines and sines."""
    model, size = layout.config.model, layout.value_bytes
    values = 2 * widths.query + 2 * widths.key
    positions = 0
    if model.position_embedding_type == "rope":
        values += widths.query + widths.key
        positions = 4 * model.seq_length // layout.context * int(model.kv_channels * model.rotary_percent)
    log_sum_exp = FP32 * layout.tokens * model.num_attention_heads // layout.tensor
    gathered = 0
    if layout.context > 1:  # keys and values of the full sequence, and the mask
        full = layout.tokens * layout.context
        gathered = size * (2 * widths.key * full) + FP32 * layout.tokens * model.seq_length
    return size * (layout.tokens * values + positions) + log_sum_exp + gathered


def _mlp_values(layout: Layout, widths: Widths) -> int:
    """Count the MLP per token: before the activation, the factors of a gated unit, and after the activation."""
    if layout.config.objective.slm_backward == "filtered":
        return widths.gates * widths.mlp
    name = activation_name(layout.config.model)
    gated = 2 if widths.gates == 2 else 1 if name == "squared_relu" else 0
    return (widths.gates + gated + 1) * widths.mlp
