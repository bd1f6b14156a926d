"""Shapes of Megatron-Core's tensors that the model settings imply, without torch."""

from __future__ import annotations

from megatron_slm.config.activation import is_gated
from megatron_slm.config.schema import ModelConfig
from megatron_slm.model.size import projection_widths


def unit_shape(key: str, model: ModelConfig) -> tuple[int, ...]:
    """Return the shape of one layer's or expert's part of a tensor, without vocabulary padding.

    Args:
        key: Megatron-Core's global key.
    """
    hidden, vocabulary, halves = model.hidden_size, model.vocab_size or 0, 2 if is_gated(model) else 1
    query, group = projection_widths(model)
    shapes = {
        "word_embeddings.weight": (vocabulary, hidden),
        "position_embeddings.weight": (model.max_position_embeddings, hidden),
        "output_layer.weight": (vocabulary, hidden),
        "linear_qkv.weight": (query + 2 * group, hidden),
        "linear_qkv.bias": (query + 2 * group,),
        "q_layernorm.weight": (model.kv_channels,),
        "k_layernorm.weight": (model.kv_channels,),
        "linear_proj.weight": (hidden, query),
        "mlp.linear_fc1.weight": (halves * model.ffn_hidden_size, hidden),
        "mlp.linear_fc1.bias": (halves * model.ffn_hidden_size,),
        "mlp.linear_fc2.weight": (hidden, model.ffn_hidden_size),
        "router.weight": (model.num_experts or 0, hidden),
        "experts.linear_fc1.weight": (halves * (model.moe_ffn_hidden_size or 0), hidden),
        "experts.linear_fc2.weight": (hidden, model.moe_ffn_hidden_size or 0),
    }
    return next((shape for name, shape in shapes.items() if key.endswith(name)), (hidden,))
