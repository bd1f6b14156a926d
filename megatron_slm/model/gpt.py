"""Builds GPT models (Llama and GPT-2 style) on Megatron-Core whose last stage returns token losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_slm.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig, TrainingConfig
from megatron_slm.model.size import ffn_size, padded_vocab_size
from megatron_slm.model.specs import choose_implementation, layer_spec
from megatron_slm.objective.linear_cross_entropy.early import EarlySelection
from megatron_slm.objective.linear_cross_entropy.head import LMHead
from megatron_slm.objective.linear_cross_entropy.token_loss import linear_cross_entropy
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups


class GPT(GPTModel):
    """Megatron-Core's GPT whose last stage goes from hidden states to token losses without the logits in between.

    With labels, the last stage returns token losses [b, s] in fp32; with ``reports_entropy`` it returns
    [2, b, s]: token losses and the entropies of the next-token distributions, in nats. Without labels it returns
    logits, as Megatron-Core does.
    """

    reports_entropy = False
    lm_head: LMHead
    _early: tuple[Tensor, EarlySelection] | None = None  # labels of the main head, and its early tokens

    def forward(
        self, *inputs: Any, labels: Tensor | None = None, early: EarlySelection | None = None, **more: Any
    ) -> Tensor:
        """Megatron-Core's forward pass; ``early`` names tokens whose gradient may be computed at once."""
        if labels is None or not self.post_process:
            return super().forward(*inputs, labels=labels, **more)
        self._early = (labels, early) if early is not None else None
        with _passing_hidden_states_on(self.output_layer):
            return super().forward(*inputs, labels=labels, **more)

    def compute_language_model_loss(self, labels: Tensor, hidden: Tensor) -> Tensor:
        """Token losses of ``labels`` [b, s], from the hidden states [s, b, h] that the output layer passed on."""
        is_main = self._early is not None and labels is self._early[0]
        losses = linear_cross_entropy(
            hidden,
            self._lm_head_weight(),
            labels.t().contiguous(),
            self.lm_head,
            early=self._early[1] if self._early is not None and is_main else None,
            with_entropy=self.reports_entropy,
        )
        token_loss = losses.loss.t().contiguous()
        return token_loss if losses.entropy is None else torch.stack((token_loss, losses.entropy.t()))

    def _lm_head_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


@contextmanager
def _passing_hidden_states_on(output_layer: torch.nn.Module) -> Iterator[None]:
    """Let the output layer give back its input; its hooks, which fetch sharded parameters, still run."""
    output_layer.forward = lambda hidden, *_, **__: (hidden, None)
    try:
        yield
    finally:
        del output_layer.forward


def build_model(
    model: ModelConfig,
    *,
    vocab_size: int,
    parallel: ParallelConfig,
    training: TrainingConfig,
    objective: ObjectiveConfig,
    groups: Groups,
    bf16: bool,
    reports_entropy: bool = False,
) -> list[torch.nn.Module]:
    """This rank's model chunks, on its device: one, or one per virtual pipeline stage.

    Args:
        vocab_size: the tokenizer's size; it is padded to a multiple of --make-vocab-size-divisible-by x TP.
        bf16: bfloat16 weights, each chunk wrapped in Megatron-Core's Float16Module.
        reports_entropy: the last stage also reports entropies (for a reference model).
    """
    implementation = choose_implementation(model.transformer_impl, groups.device)
    config = transformer_config(model, parallel, training, groups, implementation, bf16=bf16)
    head = lm_head(model, parallel, objective, vocab_size, groups)
    virtual_stages = config.virtual_pipeline_model_parallel_size or 1
    chunks: list[torch.nn.Module] = []
    for stage in range(virtual_stages):
        chunk = GPT(
            config=config,
            transformer_layer_spec=layer_spec(model, config, implementation),
            vocab_size=padded_vocab_size(model, vocab_size, parallel.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings or model.seq_length or 0,
            pre_process=groups.is_first_stage and stage == 0,
            post_process=groups.is_last_stage and stage == virtual_stages - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            vp_stage=stage if config.virtual_pipeline_model_parallel_size else None,
        )
        chunk.reports_entropy = reports_entropy
        chunk.lm_head = head
        chunk.to(groups.device)
        chunks.append(Float16Module(config, chunk) if bf16 else chunk)
    return chunks


def lm_head(
    model: ModelConfig, parallel: ParallelConfig, objective: ObjectiveConfig, vocab_size: int, groups: Groups
) -> LMHead:
    """How token losses are computed: what the flags ask for, else Triton's kernels on a GPU that has Triton.

    Raises:
        ConfigError: --slm-cross-entropy triton without a GPU or without Triton.
    """
    installed = importlib.util.find_spec("triton") is not None
    can_triton = installed and groups.device.type == "cuda"
    if objective.slm_cross_entropy == "triton" and not can_triton:
        missing = "Triton is not installed" if not installed else "there is no GPU"
        raise ConfigError(f"--slm-cross-entropy triton: {missing}. Use chunked, or leave the flag out.")
    return LMHead(
        group=groups.tp,
        vocab_size=vocab_size,
        sequence_parallel=parallel.sequence_parallel,
        softcap=model.slm_logit_softcap,
        z_loss=objective.slm_z_loss,
        engine=objective.slm_cross_entropy or ("triton" if can_triton else "chunked"),
        kept_bytes=objective.slm_kept_logits_mb << 20,
    )


def model_config(chunks: list[torch.nn.Module]) -> TransformerConfig:
    """Megatron-Core's configuration, which all chunks of a model share."""
    return get_model_config(chunks[0])


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    groups: Groups,
    implementation: str,
    *,
    bf16: bool,
) -> TransformerConfig:
    """Megatron-Core's configuration of the model. Losses are normalised per token, over the global batch."""
    assert model.num_layers and model.hidden_size and model.num_attention_heads, "checked by config.checks"
    dtype = torch.bfloat16 if bf16 else torch.float32
    on_gpu = groups.device.type == "cuda"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=ffn_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups if model.group_query_attention else None,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_method_std,
        attention_softmax_in_fp32=model.attention_softmax_in_fp32,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(model, parallel),
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        masked_softmax_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=implementation == "transformer_engine",
        persist_layer_norm=implementation == "transformer_engine",
        gradient_accumulation_fusion=on_gpu and _has_fused_gradient_accumulation(),
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=False,
        batch_p2p_comm=True,
    )


def virtual_stages(model: ModelConfig, parallel: ParallelConfig) -> int | None:
    """Model chunks per pipeline rank of the interleaved schedule, or None for the plain one."""
    if not parallel.num_layers_per_virtual_pipeline_stage or not model.num_layers:
        return None
    per_rank = model.num_layers // parallel.pipeline_model_parallel_size
    return per_rank // parallel.num_layers_per_virtual_pipeline_stage


def _has_fused_gradient_accumulation() -> bool:
    """NVIDIA's apex, built with its C++ extensions, offers the kernel that Megatron-Core calls."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
