"""Which modules a transformer layer is made of: plain torch everywhere, Transformer Engine on GPUs.

The plain layer is Megatron-Core's own, with two parts exchanged: a torch norm that also works under sequence
parallelism, and attention by torch's ``scaled_dot_product_attention``, which keeps no [s, s] matrix of scores.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_slm.config.schema import ModelConfig
from megatron_slm.data.batches import context_positions
from megatron_slm.runtime.errors import ConfigError


class TorchNorm:
    """LayerNorm or RMSNorm of torch whose parameters tell Megatron-Core that they see a shard of the sequence.

    Megatron-Core sums the gradients of parameters marked ``sequence_parallel`` over the tensor-parallel group.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class TorchAttention(MegatronModule):
    """Causal attention over the heads of this tensor-parallel rank, by ``scaled_dot_product_attention``.

    Under context parallelism each rank gathers the keys and values of the whole sequence, and attends from its own
    positions; the gradients of keys and values go back to the ranks that they came from.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.context = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d]; key and value [s, b, groups, d], where groups divides heads.
            attention_mask: [b, 1, s, s] bool, True where attention is forbidden; None for causal attention. Under
                context parallelism its columns are those of the whole sequence.

        Returns:
            [s, b, heads * d]
        """
        if self.context is not None and self.context.size() > 1:
            key, value, attention_mask = self._whole_context(key, value, attention_mask)
        allowed = None if attention_mask is None else ~attention_mask
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        arguments: dict[str, Any] = {
            "attn_mask": allowed,
            "is_causal": allowed is None,
            "dropout_p": dropout,
            "scale": self.scale,
            "enable_gqa": query.size(2) != key.size(2),
        }
        if dropout and not self.config.sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = F.scaled_dot_product_attention(q, k, v, **arguments)
        else:
            context = F.scaled_dot_product_attention(q, k, v, **arguments)
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _whole_context(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all context-parallel ranks in the order of positions, and the mask of these queries."""
        assert self.context is not None
        size, device = self.context.size(), key.device
        length = key.size(0) * size
        places = [context_positions(length, size, rank) for rank in range(size)]
        order = torch.cat(places).argsort().to(device)
        key, value = (
            gather_from_sequence_parallel_region(part.contiguous(), group=self.context)[order] for part in (key, value)
        )
        if mask is None:
            own = places[self.context.rank()].to(device)
            mask = torch.arange(length, device=device) > own[:, None]
        return key, value, mask


def choose_implementation(wanted: str | None, device: torch.device) -> str:
    """The layer implementation: what was asked for, else Transformer Engine on a GPU that has it.

    Raises:
        ConfigError: Transformer Engine was asked for and is not there.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not (installed and device.type == "cuda"):
        missing = "it is not installed" if not installed else "there is no GPU"
        raise ConfigError(
            f"--transformer-impl transformer_engine: {missing}. Use --transformer-impl local, or leave it out."
        )
    return wanted or ("transformer_engine" if installed and device.type == "cuda" else "local")


def layer_spec(
    model: ModelConfig, config: TransformerConfig, implementation: str, vp_stage: int | None, pp_rank: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of the transformer layers of one model chunk."""
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts, moe_grouped_gemm=model.moe_grouped_gemm, qk_layernorm=model.qk_layernorm
        )
    if model.num_experts is not None and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # Megatron-Core forgets the name where there is no Transformer Engine
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts, qk_layernorm=model.qk_layernorm, normalization=model.normalization
    )
    spec.submodules.input_layernorm = TorchNorm
    spec.submodules.pre_mlp_layernorm = TorchNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=TorchNorm)


def further_heads_spec(
    config: TransformerConfig,
    layers: ModuleSpec | TransformerBlockSubmodules,
    implementation: str,
    vp_stage: int | None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """The specification of the heads of multi-token prediction; None on chunks that have none."""
    on_engine = implementation == "transformer_engine"
    spec = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=on_engine, vp_stage=vp_stage)
    if spec is not None and not on_engine:
        for layer in spec.layer_specs:
            parts = layer.submodules
            parts.enorm = parts.hnorm = parts.layer_norm = TorchNorm
    return spec
