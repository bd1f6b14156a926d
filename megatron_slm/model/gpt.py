"""Build GPT models (Llama and GPT-2 style) on Megatron-Core whose last stage returns hidden states."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_slm.config.core_fields import core_fields
from megatron_slm.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig, PrecisionConfig, TrainingConfig
from megatron_slm.mcore.gradient_fusion import fuses_weight_gradients, fusion_without_apex
from megatron_slm.mcore.layers import additive_mask
from megatron_slm.mcore.positions import RotaryByPosition
from megatron_slm.model.activation import activation_settings
from megatron_slm.model.fp8 import check_fp8
from megatron_slm.model.hidden_states import HiddenStates, LMHead
from megatron_slm.model.packed_documents import is_packed, packed_sequences
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.model.size import padded_vocab_size
from megatron_slm.model.specs import choose_implementation, layer_spec, mtp_heads_spec
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups

# Arguments of the MTP layers that Megatron-Core's forward pass provides to its post-processing.
MTP_INPUTS = (
    *("input_ids", "position_ids", "attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"),
    *("packed_seq_params", "sequence_len_offset"),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}  # by setting
HIGH_PRECISION = PrecisionConfig()  # no FP8
SAVED_LOGITS_MB = {"cpu": 64, "cuda": 2048}  # a GPU saves the logits of 16,384 tokens of a vocabulary of 32,000


class GPT(GPTModel):
    """Megatron-Core's GPT whose last stage returns :class:`HiddenStates` instead of logits or losses."""

    has_torch_attention = False

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        if attention_mask is not None and is_packed(self, attention_mask):
            packed = packed_sequences(attention_mask, tokens.device)
            output = super().forward(
                tokens.reshape(1, -1), position_ids.reshape(1, -1), None, packed_seq_params=packed, **options
            )
            return replace(output, samples=tokens.size(0)) if isinstance(output, HiddenStates) else output
        if isinstance(rotary := getattr(self, "rotary_pos_emb", None), RotaryByPosition):
            rotary.position_ids = position_ids if options.get("inference_context") is None else None
        if attention_mask is not None and attention_mask.dtype == torch.bool and self.has_torch_attention:
            attention_mask = additive_mask(attention_mask, self.config.params_dtype)
        return super().forward(tokens, position_ids, attention_mask, **options)

    def _postprocess(self, hidden_states: Tensor, mtp_in_postprocess: bool = False, **inputs: Any) -> Any:
        """Run the MTP layers, and return the hidden states of all heads on the last stage.

        Megatron-Core would add the losses of the MTP heads to the gradient independently of the selection.
        """
        if mtp_in_postprocess:
            mtp_inputs = {name: inputs[name] for name in MTP_INPUTS}
            hidden_states = self.mtp(hidden_states=hidden_states, embedding=self.embedding, **mtp_inputs)
        if not self.post_process:
            return hidden_states
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return HiddenStates(hidden_states.chunk(1 + (self.config.mtp_num_layers or 0)), self.output_layer, weight)


def build_model(
    model: ModelConfig,
    *,
    vocab_size: int,
    parallel: ParallelConfig,
    training: TrainingConfig,
    objective: ObjectiveConfig,
    groups: Groups,
    params_dtype: str,
    precision: PrecisionConfig = HIGH_PRECISION,
    resets_positions: bool = False,
    isolates_documents: bool = False,
    backward_filter: BackwardFilter | None = None,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks on its device: one, or one per virtual pipeline stage.

    Args:
        vocab_size: tokenizer size; padded to a multiple of --make-vocab-size-divisible-by x TP.
        params_dtype: dtype of the weights: fp32, bf16 or fp16.
        precision: FP8 settings of the linear layers.
        resets_positions: position ids differ between samples (--reset-position-ids).
        isolates_documents: tokens attend to their document only (--reset-attention-mask).
        backward_filter: its selected tokens restrict the backward pass of the layers; None for the exact one.

    Raises:
        ConfigError: a layer implementation or token dispatcher is not available on this machine.
    """
    implementation = choose_implementation(model.transformer_impl, groups.device, params_dtype)
    check_dispatcher(model, groups.device)
    check_fp8(precision, implementation, groups.device)
    config = transformer_config(
        model, parallel, training, groups, implementation, params_dtype=params_dtype, precision=precision
    )
    restarts_by_packing = isolates_documents and implementation == "transformer_engine"
    rotates_by_id = resets_positions and not restarts_by_packing and model.position_embedding_type == "rope"
    if rotates_by_id:
        config.apply_rope_fusion = False  # the fused kernel assumes the same positions in all samples
    if backward_filter is not None:
        config.gradient_accumulation_fusion = False  # of the filtered linear layers
    head = linear_cross_entropy_config(model, parallel, objective, max(vocab_size, model.vocab_size or 0), groups)
    if backward_filter is not None:
        head = replace(head, host_reads=backward_filter.host_reads)
    options = _chunk_options(model, padded_vocab_size(model, vocab_size, parallel.tensor_model_parallel_size))
    chunks: list[torch.nn.Module] = []
    for stage in range(config.virtual_pipeline_model_parallel_size or 1):
        vp_stage = stage if config.virtual_pipeline_model_parallel_size else None
        chunk = _build_chunk(config, model, groups, implementation, vp_stage, backward_filter, options)
        if chunk.post_process:
            LMHead.convert(chunk.output_layer, head)
        if rotates_by_id:
            chunk.rotary_pos_emb = RotaryByPosition(chunk.rotary_pos_emb)
        chunk.has_torch_attention = implementation == "local"
        chunk.to(groups.device)
        chunks.append(chunk if params_dtype == "fp32" else Float16Module(config, chunk))
    return chunks


def _chunk_options(model: ModelConfig, padded_size: int) -> dict[str, Any]:
    """Return the arguments that all chunks of a model share, for a vocabulary of ``padded_size``."""
    return {
        "vocab_size": padded_size,
        "max_sequence_length": model.max_position_embeddings,
        "parallel_output": True,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "position_embedding_type": model.position_embedding_type,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor,
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }


def _build_chunk(
    config: TransformerConfig,
    model: ModelConfig,
    groups: Groups,
    implementation: str,
    vp_stage: int | None,
    backward_filter: BackwardFilter | None,
    options: dict[str, Any],
) -> GPT:
    """Build the model chunk of one virtual pipeline stage; None is the only stage of this rank."""
    layers = layer_spec(model, config, implementation, vp_stage, groups.pp_rank, backward_filter)
    last = (config.virtual_pipeline_model_parallel_size or 1) - 1
    fuses = config.gradient_accumulation_fusion and implementation == "transformer_engine"
    with fusion_without_apex() if fuses else nullcontext():
        return GPT(
            config=config,
            transformer_layer_spec=layers,
            pre_process=groups.is_first_stage and not vp_stage,
            post_process=groups.is_last_stage and (vp_stage or 0) == last,
            vp_stage=vp_stage,
            mtp_block_spec=mtp_heads_spec(config, layers, implementation, vp_stage) if model.mtp_num_layers else None,
            **options,
        )


def check_dispatcher(model: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError if the token dispatcher does not support the device."""
    if model.num_experts and model.moe_token_dispatcher_type == "alltoall" and device.type == "cpu":
        raise ConfigError("--moe-token-dispatcher-type alltoall needs GPUs. Use allgather, or omit the flag.")


def choose_cross_entropy(requested: str | None, device: torch.device) -> str:
    """Return the token-loss implementation: the requested one, else Triton if available, else chunked.

    Raises:
        ConfigError: --slm-cross-entropy triton without a GPU or without Triton.
    """
    installed = importlib.util.find_spec("triton") is not None
    has_triton = installed and device.type == "cuda"
    if requested == "triton" and not has_triton:
        missing = "Triton is not installed" if not installed else "there is no GPU"
        raise ConfigError(f"--slm-cross-entropy triton: {missing}. Use chunked, or omit the flag.")
    return requested or ("triton" if has_triton else "chunked")


def saved_logits_bytes(objective: ObjectiveConfig, device: torch.device) -> int:
    """Return the size up to which the logits of a micro-batch are saved for the backward pass, in bytes."""
    size = objective.slm_saved_logits_mb
    return (SAVED_LOGITS_MB[device.type] if size is None else size) << 20


def linear_cross_entropy_config(
    model: ModelConfig, parallel: ParallelConfig, objective: ObjectiveConfig, vocab_size: int, groups: Groups
) -> LinearCrossEntropyConfig:
    """Return the configuration of the LM head's linear cross-entropy."""
    return LinearCrossEntropyConfig(
        tp_group=groups.tp,
        vocab_size=vocab_size,
        sequence_parallel=parallel.sequence_parallel,
        softcap=model.slm_logit_softcap,
        z_loss=objective.slm_z_loss,
        implementation=choose_cross_entropy(objective.slm_cross_entropy, groups.device),
        saved_logits_bytes=saved_logits_bytes(objective, groups.device),
    )


def model_config(chunks: list[torch.nn.Module]) -> TransformerConfig:
    """Return Megatron-Core's configuration, shared by all chunks of a model."""
    return get_model_config(chunks[0])


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    groups: Groups,
    implementation: str,
    *,
    params_dtype: str,
    precision: PrecisionConfig = HIGH_PRECISION,
) -> TransformerConfig:
    """Return Megatron-Core's model configuration, with losses normalized per token over the global batch.

    As in Megatron-LM, only the interleaved schedule overlaps pipeline communication, which excludes batched operations.
    It then frees outputs whose messages are not yet complete, which gloo reads until they are. The host does not wait
    for the device after each message, which Megatron-LM does because of a fault in old releases of torch.
    """
    dtype = DTYPES[params_dtype]
    on_gpu = groups.device.type == "cuda"
    virtual = virtual_stages(model, parallel)
    overlaps_pipeline = parallel.overlap_p2p_comm and virtual is not None
    given = core_fields("model", model, parallel, training, precision)
    if model.num_experts is None:
        given = {name: value for name, value in given.items() if not name.startswith(("moe_", "expert_"))}
    return TransformerConfig(
        **given,
        **activation_settings(model, groups.device),
        num_query_groups=model.num_query_groups if model.group_query_attention else None,
        add_bias_linear=not model.disable_bias_linear,
        bf16=params_dtype == "bf16",
        fp16=params_dtype == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        virtual_pipeline_model_parallel_size=virtual,
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        masked_softmax_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=implementation == "transformer_engine",
        persist_layer_norm=implementation == "transformer_engine",
        gradient_accumulation_fusion=(
            training.gradient_accumulation_fusion and on_gpu and fuses_weight_gradients(implementation)
        ),
        deallocate_pipeline_outputs=on_gpu or not overlaps_pipeline,
        overlap_p2p_comm=overlaps_pipeline,
        overlap_p2p_comm_warmup_flush=overlaps_pipeline and parallel.overlap_p2p_comm_warmup_flush,
        batch_p2p_comm=not overlaps_pipeline,
        batch_p2p_sync=False,
    )


def virtual_stages(model: ModelConfig, parallel: ParallelConfig) -> int | None:
    """Return the number of model chunks per pipeline rank, or None without the interleaved schedule."""
    if not parallel.num_layers_per_virtual_pipeline_stage or not model.num_layers:
        return None
    per_rank = model.num_layers // parallel.pipeline_model_parallel_size
    return per_rank // parallel.num_layers_per_virtual_pipeline_stage
