"""Parameters of one rank, by pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.config.activation import is_gated
from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.size import projection_widths
from megatron_slm.planning.layout import Layout


@dataclass(frozen=True)
class RankParameters:
    """Count the parameters of one rank; experts are sharded over other ranks than the rest."""

    dense: int
    experts: int
    linear: int  # those of transformer layers' matrices, which FP8 applies to
    largest: int  # those of the largest tensor

    @property
    def total(self) -> int:
        """Return the number of all parameters."""
        return self.dense + self.experts


def rank_parameters(layout: Layout, stage: int) -> RankParameters:
    """Return the parameters on each rank of a pipeline stage."""
    model, tensor = layout.config.model, layout.tensor
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    hidden, norm = model.hidden_size, norm_size(model)
    embedding = layout.padded_vocab // tensor * hidden
    mtp = (model.mtp_num_layers or 0) if is_last else 0
    layers = layout.stage_layers(stage) + mtp
    dense, experts = layer_parameters(layout)
    count = layers * dense + mtp * (3 * norm + 2 * hidden * hidden // tensor)
    is_tied = not model.untie_embeddings_and_output_weights
    embeddings = int(is_first) + int(is_last and not (is_tied and is_first))
    if mtp and not is_first and not is_tied:
        embeddings += 1  # MTP layers embed tokens on the last stage
    count += embeddings * embedding + (norm if is_last else 0)
    if model.position_embedding_type == "learned_absolute" and (is_first or mtp):
        count += model.max_position_embeddings * hidden
    matrices = [matrix // tensor for matrix in matrix_sizes(model)]
    linear = layers * (sum(matrices) if model.num_experts is None else sum(matrices[:2]) + experts)
    return RankParameters(
        dense=count,
        experts=layers * experts,
        linear=linear,
        largest=max([*matrices, embedding if embeddings else 0]),
    )


def layer_parameters(layout: Layout) -> tuple[int, int]:
    """Return the parameters of one transformer layer on one rank: without experts, and of its experts."""
    model, tensor = layout.config.model, layout.tensor
    hidden, norm = model.hidden_size, norm_size(model)
    query, key = projection_widths(model)
    dense = 2 * norm + sum(matrix_sizes(model)[:2]) // tensor
    if model.qk_layernorm:
        dense += norm // hidden * 2 * (query // model.num_attention_heads)
    has_bias = not model.disable_bias_linear
    if has_bias or model.add_qkv_bias:
        dense += (query + 2 * key) // tensor
    dense += hidden if has_bias else 0
    width = (model.ffn_hidden_size if model.num_experts is None else model.moe_ffn_hidden_size) // tensor
    mlp = sum(matrix_sizes(model)[2:]) // tensor
    mlp += hidden + width * (2 if is_gated(model) else 1) if has_bias else 0
    if model.num_experts is None:
        return dense + mlp, 0
    local = model.num_experts // layout.config.parallel.expert_model_parallel_size
    return dense + hidden * model.num_experts, local * mlp


def matrix_sizes(model: ModelConfig) -> list[int]:
    """Return the sizes of a layer's matrices: query-key-value, output projection, and both of the MLP or one expert."""
    hidden = model.hidden_size
    query, key = projection_widths(model)
    width = model.ffn_hidden_size if model.num_experts is None else model.moe_ffn_hidden_size
    return [hidden * (query + 2 * key), query * hidden, hidden * width * (2 if is_gated(model) else 1), width * hidden]


def norm_size(model: ModelConfig) -> int:
    """Return the parameters of one normalization layer."""
    return model.hidden_size * (1 if model.normalization == "RMSNorm" else 2)
