"""Documents of a micro-batch as packed sequences, for attention that takes their boundaries instead of a mask.

Transformer Engine ignores a mask of documents, but attends within packed sequences. All samples of a micro-batch then
form one row of tokens, from the first pipeline stage to the last.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor


def has_document_lengths(attention_mask: Tensor | None) -> bool:
    """Return whether the attention mask of a micro-batch is given as the lengths of its documents."""
    return attention_mask is not None and attention_mask.dtype == torch.int64


def is_packed(chunk: torch.nn.Module, attention_mask: Tensor | None) -> bool:
    """Return whether the model takes a micro-batch with this mask as one row of packed documents."""
    return has_document_lengths(attention_mask) and not get_attr_wrapped_model(chunk, "has_torch_attention")


def row_shape(chunk: torch.nn.Module, samples: int, length: int, attention_mask: Tensor | None) -> tuple[int, int]:
    """Return the number of rows that the model makes of the samples of a micro-batch, and their length."""
    return (1, samples * length) if is_packed(chunk, attention_mask) else (samples, length)


def packed_sequences(lengths: Tensor, device: torch.device) -> PackedSeqParams:
    """Return the packed sequences of the documents of all samples in order.

    The longest length is rounded up to a power of 2: kernels are chosen, and their plans cached, by this number.

    Args:
        lengths: [b, n] int64 on the host, padded by zeros; the sum of each row is the sample length.
        device: device of the tokens.
    """
    documents = [length for sample in lengths.numpy().tolist() for length in sample if length]
    sample_length = sum(documents) // len(lengths)
    longest = min(1 << (max(documents) - 1).bit_length(), sample_length)
    boundaries = torch.tensor([0, *accumulate(documents)], dtype=torch.int32).to(device, non_blocking=True)
    common: dict[str, Any] = {"cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries}
    return PackedSeqParams(qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, **common)
