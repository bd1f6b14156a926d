"""Torch modules for Megatron-Core's local transformer layer: norms, and attention that stores no score matrix."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class LayerNorm1P(torch.nn.LayerNorm):
    """LayerNorm whose weight is stored as its difference from 1."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, values: Tensor) -> Tensor:
        return F.layer_norm(values, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class RMSNorm1P(torch.nn.RMSNorm):
    """RMSNorm whose weight is stored as its difference from 1."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, values: Tensor) -> Tensor:
        return F.rms_norm(values, self.normalized_shape, self.weight + 1, self.eps)


NORMS: dict[tuple[str, bool], type[torch.nn.LayerNorm] | type[torch.nn.RMSNorm]] = {  # by name, weights less 1
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): LayerNorm1P,
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): RMSNorm1P,
}


class TorchNorm:
    """Torch LayerNorm or RMSNorm with parameters marked for sequence parallelism.

    Megatron-Core sums the gradients of parameters marked ``sequence_parallel`` over the tensor-parallel group. Its
    norms in torch do not support ``layernorm_zero_centered_gamma`` (--apply-layernorm-1p).
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        norm = NORMS[config.normalization, config.layernorm_zero_centered_gamma](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class TorchAttention(MegatronModule):
    """Causal attention over the heads of this tensor-parallel rank, by ``scaled_dot_product_attention``.

    Under context parallelism, each rank gathers the keys and values of the full sequence and attends from its local
    positions; the gradients of keys and values are reduced to their source ranks. With a key-value cache, Megatron-Core
    passes the keys and values of all positions, and the mask type ``no_mask`` for new tokens after the prompt.
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
        """Return the attention output.

        Args:
            query: [s, b, heads, d].
            key: [t, b, groups, d]; groups divides heads, and t is s without a key-value cache.
            value: as ``key``.
            attention_mask: [b, 1, s, t], bool (True for masked pairs) or additive (:func:`additive_mask`); None for
                causal attention. Under context parallelism, its columns cover the full sequence. Or the lengths of the
                documents of each sample, [b, n] int64 on the host, padded by zeros: attention is causal within each.
            attn_mask_type: ``no_mask`` attends to all keys if there is no ``attention_mask``.

        Returns:
            [s, b, heads * d]
        """
        with self._random_state():
            if attention_mask is not None and attention_mask.dtype == torch.int64:
                return self._attend_within_documents(query, key, value, attention_mask)
            if self.context is not None and self.context.size() > 1:
                key, value, attention_mask = self._gather_context(key, value, attention_mask)
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                attention_mask = additive_mask(attention_mask, query.dtype)
            is_causal = attention_mask is None and attn_mask_type is not AttnMaskType.no_mask
            return self._attend(query, key, value, attention_mask, is_causal)

    def _random_state(self) -> AbstractContextManager[None]:
        """Return the context of dropout: the tensor-parallel random state, as heads are divided among these ranks."""
        drops = self.training and self.dropout and not self.config.sequence_parallel
        return get_cuda_rng_tracker().fork() if drops else nullcontext()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return the attention output [s, b, heads * d] for an additive mask, or a causal one, or none."""
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_within_documents(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """Return the attention output if each document is a separate sequence; no pair of two documents is computed."""
        samples = []
        for sample, padded in enumerate(lengths.numpy().tolist()):
            documents = [length for length in padded if length]
            parts = (values[:, sample : sample + 1].split(documents) for values in (query, key, value))
            outputs = [self._attend(q, k, v, mask=None, is_causal=True) for q, k, v in zip(*parts, strict=True)]
            samples.append(torch.cat(outputs))
        return torch.cat(samples, 1)

    def _gather_context(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values of all context-parallel ranks in position order, and the mask of the local queries."""
        assert self.context is not None
        size, device = self.context.size(), key.device
        length = key.size(0) * size
        positions = [context_positions(length, size, rank, device) for rank in range(size)]
        order = torch.cat(positions).argsort()
        key, value = (
            gather_from_sequence_parallel_region(part.contiguous(), group=self.context)[order] for part in (key, value)
        )
        if mask is None:
            mask = torch.arange(length, device=device) > positions[self.context.rank()][:, None]
        return key, value, mask


def additive_mask(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that torch adds to attention scores, for a bool mask with True for masked pairs.

    Torch keeps a mask of this dtype for the backward pass, but converts a bool mask in every layer and keeps each copy.
    """
    return torch.zeros_like(masked, dtype=dtype).masked_fill_(masked, float("-inf"))


def context_positions(length: int, size: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Return the sample positions of context-parallel rank ``rank`` of ``size``, [length / size] int64.

    A sample is split into 2 · size chunks. Rank r holds chunks r and 2 · size - 1 - r, which balances the number of
    attended pairs over ranks (Megatron-Core's order).
    """
    chunks = torch.arange(length, device=device).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))
