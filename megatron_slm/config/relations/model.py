"""Relations of the model architecture and activation recomputation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_slm.config.relations.wording import not_dividing
from megatron_slm.config.schema import RunConfig


def attention_problem(config: RunConfig, params_dtype: str) -> str | None:
    """Return the error if Transformer Engine's attention, which packs documents as sequences, does not support a run.

    Args:
        params_dtype: dtype of the weights of the training or reference model.
    """
    is_split = config.parallel.context_parallel_size > 1
    given = {
        "--context-parallel-size above 1": is_split,
        "--mtp-num-layers": config.model.mtp_num_layers is not None,
        "--slm-backward filtered": config.objective.slm_backward == "filtered",
    }
    conflicts = " and ".join(flag for flag, is_given in given.items() if is_given)
    if config.data.reset_attention_mask and conflicts:
        return (
            "--reset-attention-mask (or --objective sft): Transformer Engine isolates documents as packed sequences, "
            f"which does not work with {conflicts}. Use --transformer-impl local."
        )
    if params_dtype == "fp32" and (config.data.reset_attention_mask or is_split):
        return (
            "--transformer-impl transformer_engine: its attention in fp32 supports neither --reset-attention-mask (or "
            "--objective sft) nor --context-parallel-size above 1. Add --bf16 or --fp16, or use --transformer-impl "
            "local."
        )
    return None


def heads(config: RunConfig, _: int) -> Iterator[str]:
    """Require attention heads that divide the hidden size, and query groups that divide the heads."""
    model = config.model
    count = model.num_attention_heads
    if model.group_query_attention and model.num_query_groups is None:
        yield "--group-query-attention needs --num-query-groups, the number of key/value heads."
    elif model.group_query_attention:
        yield from not_dividing(model.num_query_groups or 0, "--num-query-groups", count, "--num-attention-heads")
    elif model.num_query_groups is not None:
        yield "--num-query-groups has no effect without --group-query-attention."
    if model.kv_channels is None:
        yield from not_dividing(count, "--num-attention-heads", model.hidden_size, "--hidden-size")


def positions(config: RunConfig, _: int) -> Iterator[str]:
    """Require enough positions for the sequence, and an even number of rotary channels per head."""
    model = config.model
    length, longest = model.seq_length, model.max_position_embeddings
    if length > longest:
        yield f"--seq-length {length} is longer than --max-position-embeddings {longest}."
    if model.position_embedding_type != "rope":
        return
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    rotated = int(width * model.rotary_percent)
    if rotated < 2 or rotated % 2:
        yield (
            f"--position-embedding-type rope rotates pairs of channels, and --rotary-percent {model.rotary_percent:g} "
            f"of {width} channels per head is {rotated}. Choose an even number of channels "
            "(--kv-channels, or --hidden-size / --num-attention-heads)."
        )


def activation(config: RunConfig, _: int) -> Iterator[str]:
    """Refuse --swiglu with a different --activation."""
    model = config.model
    if model.swiglu and model.activation not in (None, "swiglu"):
        yield f"--swiglu contradicts the activation {model.activation}. Leave --swiglu out (--no-swiglu)."


def attention(config: RunConfig, _: int) -> Iterator[str]:
    """Require a layer implementation whose attention supports documents and context parallelism as given."""
    if config.model.transformer_impl != "transformer_engine":
        return
    if (problem := attention_problem(config, config.training.params_dtype)) is not None:
        yield problem


def prediction_heads(config: RunConfig, _: int) -> Iterator[str]:
    """Require multi-token prediction to fit the sequence length and the pipeline."""
    model, count = config.model, config.model.mtp_num_layers
    if count is None:
        return
    if config.parallel.pipeline_model_parallel_size > 1 and not model.untie_embeddings_and_output_weights:
        yield (
            "--mtp-num-layers with --pipeline-model-parallel-size above 1 needs "
            "--untie-embeddings-and-output-weights: Megatron-Core cannot save a tied embedding there."
        )
    if count >= model.seq_length:
        yield f"--mtp-num-layers {count} leaves no token of a sample of --seq-length {model.seq_length}."


def recomputation(config: RunConfig, _: int) -> Iterator[str]:
    """Require complete settings for full recomputation, with units that divide a pipeline stage."""
    training = config.training
    method, layers = training.recompute_method, training.recompute_num_layers
    if training.recompute_granularity == "full":
        if method is None or layers is None:
            yield "--recompute-granularity full needs --recompute-method and --recompute-num-layers."
        elif method == "uniform":
            parallel = config.parallel
            stage = config.model.num_layers // parallel.pipeline_model_parallel_size
            stage = parallel.num_layers_per_virtual_pipeline_stage or stage
            yield from not_dividing(layers, "--recompute-num-layers", stage, "layers per pipeline stage,")
    elif method is not None or layers is not None:
        given = "--recompute-method" if method is not None else "--recompute-num-layers"
        yield f"{given} has no effect without --recompute-granularity full. Add it, or leave {given} out."


RELATIONS = (heads, positions, activation, attention, prediction_heads, recomputation)
