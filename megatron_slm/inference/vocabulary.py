"""Next tokens from vocabulary-sharded logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sharded_argmax(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the ids with the highest logits, [n] int64; the lowest id among equals, -1 if a logit is NaN.

    Args:
        logits: [n, V / tp], this rank's vocabulary shard.
        group: tensor-parallel ranks in the order of their shards.
    """
    highest, ids = logits.max(-1)
    if group is not None and group.size() > 1:
        best = torch.stack((highest.double(), (ids + group.rank() * logits.size(-1)).double()))
        shards = [torch.empty_like(best) for _ in range(group.size())]
        dist.all_gather(shards, best, group=group)
        values, places = torch.stack(shards).unbind(1)  # [tp, n] each
        highest, shard = values.max(0)
        ids = places.gather(0, shard[None])[0].long()
    return ids.where(~highest.isnan(), -1)


def gather_vocabulary(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the logits of the full padded vocabulary, [n, V], from the shards [n, V / tp]."""
    if group is None or group.size() == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, -1)
