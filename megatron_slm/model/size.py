"""Compute padded vocabulary, parameter count and FLOPs from the model configuration, without torch."""

from __future__ import annotations

from megatron_slm.config.activation import is_gated
from megatron_slm.config.schema import ModelConfig, RunConfig

MOMENTS = {"adam": 2, "sgd": 1}  # tensors of the optimizer state in fp32, besides master weights


def padded_vocab_size(model: ModelConfig, vocab_size: int, tensor_parallel: int) -> int:
    """Return the padded vocabulary size.

    The larger of the tokenizer's size and --vocab-size is rounded up to a multiple of
    --make-vocab-size-divisible-by x TP.
    """
    multiple = model.make_vocab_size_divisible_by * tensor_parallel
    return -(-max(vocab_size, model.vocab_size or 0) // multiple) * multiple


def projection_widths(model: ModelConfig) -> tuple[int, int]:
    """Return the widths of the query projection and of one key or value projection."""
    heads, width = model.num_attention_heads, model.kv_channels
    groups = model.num_query_groups if model.group_query_attention and model.num_query_groups else heads
    return heads * width, groups * width


def matrix_parameters(model: ModelConfig, *, active: bool = True) -> int:
    """Return the parameter count of all matrices except embeddings and LM head.

    Args:
        active: count only the experts that process a token (--moe-router-topk) instead of all experts.
    """
    hidden = model.hidden_size
    query, key = projection_widths(model)
    attention = hidden * (query + 2 * key) + query * hidden
    matrices = 3 if is_gated(model) else 2
    if model.num_experts is None:
        mlp = matrices * hidden * model.ffn_hidden_size
    else:
        experts = model.moe_router_topk if active else model.num_experts
        mlp = experts * matrices * hidden * model.moe_ffn_hidden_size + hidden * model.num_experts
    mtp_layers = model.mtp_num_layers or 0
    return (model.num_layers + mtp_layers) * (attention + mlp) + mtp_layers * 2 * hidden * hidden


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Return the parameter count of the model with a padded vocabulary, including biases and norms."""
    hidden = model.hidden_size
    query, key = projection_widths(model)
    embeddings = vocab_size * hidden * (2 if model.untie_embeddings_and_output_weights else 1)
    if model.position_embedding_type == "learned_absolute":
        embeddings += model.max_position_embeddings * hidden
    norm = hidden * (1 if model.normalization == "RMSNorm" else 2)
    head_norm = (norm // hidden) * 2 * (query // model.num_attention_heads)
    per_layer = 2 * norm + (head_norm if model.qk_layernorm else 0)
    if not model.disable_bias_linear:
        width = model.ffn_hidden_size if model.num_experts is None else model.moe_ffn_hidden_size
        per_layer += hidden + (model.num_experts or 1) * (hidden + width * (2 if is_gated(model) else 1))
    if not model.disable_bias_linear or model.add_qkv_bias:
        per_layer += query + 2 * key
    mtp_layers = model.mtp_num_layers or 0
    layers = (model.num_layers + mtp_layers) * per_layer + mtp_layers * 3 * norm
    return matrix_parameters(model, active=False) + embeddings + norm + layers


def forward_flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs of a forward pass per token.

    Each matrix parameter counts two FLOPs; causal attention covers half of the sequence on average.
    """
    query, _ = projection_widths(model)
    mtp_layers = model.mtp_num_layers or 0
    attention = 2 * model.seq_length * query * (model.num_layers + mtp_layers)
    return 2 * (matrix_parameters(model) + (1 + mtp_layers) * model.hidden_size * vocab_size) + attention


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs of forward and backward per token; a backward pass counts as two forward passes."""
    return 3 * forward_flops_per_token(model, vocab_size)


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Return the size of one checkpoint, a lower bound: weights, those of --reference-history, optimizer state."""
    padded = padded_vocab_size(config.model, vocab_size, config.parallel.tensor_model_parallel_size)
    has_masters, optimizer = config.training.params_dtype != "fp32", config.optimizer.optimizer
    per_parameter = 2 if has_masters else 4
    if config.checkpoint.save_optim:
        has_momentum = optimizer != "sgd" or config.optimizer.sgd_momentum
        per_parameter += 4 * MOMENTS[optimizer] if has_momentum else 0
        per_parameter += 4 if has_masters or config.parallel.use_distributed_optimizer else 0  # master weights
    if config.reference.reference_history is not None:
        is_fp32 = config.reference.reference_history == "average" or not has_masters
        per_parameter += 4 if is_fp32 else 2
    return per_parameter * parameter_count(config.model, padded)
