"""Settings of an LM head and of how its cross-entropy is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.linear_cross_entropy.backward_rows import BackwardRows
from megatron_slm.runtime.host_reads import HostReads

IMPLEMENTATIONS = ("torch", "chunked", "triton")


@dataclass(frozen=True)
class LinearCrossEntropyConfig:
    """Settings of an LM head and its cross-entropy, the same for every micro-batch."""

    tp_group: ProcessGroup | None = None  # tensor-parallel ranks, in the order of their vocabulary shards
    vocab_size: int | None = None  # entries of the vocabulary before padding; None: there is no padding
    sequence_parallel: bool = False  # hidden states come as [s / tp, b, h], this rank's part of the sequence
    softcap: float | None = None  # c of c · tanh(z / c)
    z_loss: float = 0.0  # ζ
    implementation: str = "chunked"
    chunk_bytes: int | None = None  # largest chunk of logits; None: a fitting one for device and size
    saved_logits_bytes: int = 0  # logits of a micro-batch up to this size are saved for the backward pass
    host_reads: HostReads = field(default_factory=HostReads, compare=False)  # with those of the layers, if they read


class TokenLosses(NamedTuple):
    """Losses and entropies of the tokens; both fp32, the same on every rank of the tensor-parallel group."""

    loss: Tensor  # [s, b], with its graph
    entropy: Tensor | None  # [s, b], nats, of the next-token distribution; no gradient
    rows: BackwardRows | None = None  # of the backward pass, if the host reads their number
