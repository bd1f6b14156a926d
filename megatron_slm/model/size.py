"""Sizes that follow from the model's flags alone: widths, padded vocabulary, parameters, FLOPs. No torch here."""

from __future__ import annotations

from megatron_slm.config.activation import is_gated
from megatron_slm.config.schema import ModelConfig


def ffn_size(model: ModelConfig) -> int:
    """Width of the MLP: as given, else 4h, or if it is gated 8h/3 rounded down to a multiple of 64 (as Megatron-LM)."""
    hidden = model.hidden_size or 0
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    return max(hidden * 8 // 3 // 64 * 64, 64) if is_gated(model) else 4 * hidden


def expert_size(model: ModelConfig) -> int:
    """Width of one expert."""
    return model.moe_ffn_hidden_size or ffn_size(model)


def padded_vocab_size(model: ModelConfig, vocab_size: int, tensor_parallel: int) -> int:
    """The larger of the tokenizer's size and --vocab-size, rounded up to a multiple of --make-vocab-size-divisible-by
    x TP."""
    multiple = model.make_vocab_size_divisible_by * tensor_parallel
    return -(-max(vocab_size, model.vocab_size or 0) // multiple) * multiple


def _head_sizes(model: ModelConfig) -> tuple[int, int]:
    """Widths of the query projection and of one of the key and value projections."""
    heads = model.num_attention_heads or 1
    width = model.kv_channels or (model.hidden_size or 0) // heads
    groups = model.num_query_groups if model.group_query_attention and model.num_query_groups else heads
    return heads * width, groups * width


def matrix_parameters(model: ModelConfig, *, passed: bool = True) -> int:
    """Parameters of all matrices without embeddings and LM head; where there are experts, those of the experts that
    a token passes, or of all of them."""
    hidden = model.hidden_size or 0
    query, key = _head_sizes(model)
    attention = hidden * (query + 2 * key) + query * hidden
    matrices = 3 if is_gated(model) else 2
    if model.num_experts is None:
        mlp = matrices * hidden * ffn_size(model)
    else:
        experts = model.moe_router_topk if passed else model.num_experts
        mlp = experts * matrices * hidden * expert_size(model) + hidden * model.num_experts
    heads = model.mtp_num_layers or 0
    return ((model.num_layers or 0) + heads) * (attention + mlp) + heads * 2 * hidden * hidden


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """All parameters of the model with an (already padded) vocabulary, biases and norms included."""
    hidden = model.hidden_size or 0
    query, key = _head_sizes(model)
    embeddings = vocab_size * hidden * (2 if model.untie_embeddings_and_output_weights else 1)
    if model.position_embedding_type == "learned_absolute":
        embeddings += (model.max_position_embeddings or model.seq_length or 0) * hidden
    norm = hidden * (1 if model.normalization == "RMSNorm" else 2)
    head_norm = (norm // max(hidden, 1)) * 2 * (query // (model.num_attention_heads or 1))
    per_layer = 2 * norm + (head_norm if model.qk_layernorm else 0)
    if not model.disable_bias_linear:
        width = ffn_size(model) if model.num_experts is None else expert_size(model)
        per_layer += hidden + (model.num_experts or 1) * (hidden + width * (2 if is_gated(model) else 1))
    if not model.disable_bias_linear or model.add_qkv_bias:
        per_layer += query + 2 * key
    heads = model.mtp_num_layers or 0
    layers = ((model.num_layers or 0) + heads) * per_layer + heads * 3 * norm
    return matrix_parameters(model, passed=False) + embeddings + norm + layers


def forward_flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """FLOPs of one forward pass per token: two per parameter of every matrix, and attention over half the
    sequence on average (causal)."""
    query, _ = _head_sizes(model)
    heads = model.mtp_num_layers or 0
    attention = 2 * (model.seq_length or 0) * query * ((model.num_layers or 0) + heads)
    return 2 * (matrix_parameters(model) + (1 + heads) * (model.hidden_size or 0) * vocab_size) + attention


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """FLOPs of forward and backward per token, the backward pass counted as two forward passes."""
    return 3 * forward_flops_per_token(model, vocab_size)
