"""The exact distributed top-k threshold: a radix select over order-preserving 32-bit keys.

Every rank holds some of the values of a ranking. Three histograms (11, 11 and 10 bits of the key, highest first),
each all-reduced, walk down to the one key that the k-th largest value has. The cost on the wire is constant: at most
3 x 2048 counts of 8 bytes per ranking, whatever the number of tokens. The answer is the k-th largest of the gathered
values, for any split over ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of the three digits of a 32-bit key, highest first


def order_keys(values: Tensor) -> Tensor:
    """Integers in [0, 2^32) that are ordered as ``values`` (fp32) are; -0.0 and 0.0 get the same key.

    The bits of a positive float already sort as integers do; those of a negative one sort backwards. So the sign
    bit is flipped for the former and all bits for the latter. int64, shape of ``values``.
    """
    bits = (values.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # adding 0.0 turns -0.0 into 0.0
    return torch.where(bits >= 1 << 31, bits ^ 0xFFFFFFFF, bits ^ (1 << 31))


def key_values(keys: Tensor) -> Tensor:
    """The fp32 values that :func:`order_keys` gave ``keys`` to."""
    bits = torch.where(keys >= 1 << 31, keys ^ (1 << 31), keys ^ 0xFFFFFFFF)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def all_reduce_sum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """``values`` summed over ``group``, in place; None is a group of this rank alone."""
    if group is not None and group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def largest_key(keys: Tensor, among: Tensor, count: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The ``count``-th largest key of each ranking, over all ranks.

    Args:
        keys: [r, n] int64 in [0, 2^32); n may differ between ranks, and be 0.
        among: [r, n] bool, the keys that take part.
        count: [r] int64, at least 1, the same on every rank; the answer means something only where as many take part.
        group: the ranks that share the rankings.

    Returns:
        the key, [r] int64, and how many of the keys equal to it belong to the ``count`` largest, [r] int64.
    """
    left = count.clone()
    prefix = torch.zeros_like(count)
    for shift, bits in DIGITS:
        higher_digits_agree = keys >> (shift + bits) == prefix[:, None]
        digit = (keys >> shift) & ((1 << bits) - 1)
        histogram = keys.new_zeros(keys.size(0), 1 << bits)
        histogram.scatter_add_(1, digit, (among & higher_digits_agree).long())
        all_reduce_sum(histogram, group)
        at_least = histogram.flip(1).cumsum(1).flip(1)  # keys whose digit is this or larger
        chosen = ((at_least >= left[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)  # 0 where nothing takes part
        left = left - (at_least.gather(1, chosen) - histogram.gather(1, chosen)).squeeze(1)
        prefix = (prefix << bits) | chosen.squeeze(1)
    return prefix, left


def select_highest(
    scores: Tensor, valid: Tensor, count: Tensor, order: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Select exactly the ``count`` highest valid scores of each ranking.

    Scores that are equal at the threshold are taken in increasing ``order``, so that the selection depends on the
    tokens alone and not on how they are spread over ranks. Only where there are such ties is the threshold of
    ``order`` sought too; the decision rests on global numbers, so that all ranks agree on it.

    Args:
        scores: [r, n] fp32 without NaN, r rankings; infinities are allowed.
        valid: [r, n] bool.
        count: [r] int64, at most the number of valid scores over all ranks, the same on every rank.
        order: [r, n] int64 in [0, 2^31), different for all tokens of a ranking.
        group: the ranks that share the rankings; None ranks what is here alone.

    Returns:
        selected [r, n] bool, and threshold [r] fp32: the lowest selected score (+inf where count is 0).
    """
    some = count > 0
    keys = order_keys(scores)
    key, needed = largest_key(keys, valid, count.clamp(min=1), group)
    tied = valid & (keys == key[:, None])
    selected = valid & (keys > key[:, None])
    ties = all_reduce_sum(tied.sum(1), group)
    if bool((some & (ties > needed)).any()):
        reverse = (1 << 31) - order  # the lowest order has the largest key
        last, _ = largest_key(reverse, tied, needed.minimum(ties).clamp(min=1), group)
        tied &= reverse >= last[:, None]
    selected = (selected | tied) & some[:, None]
    return selected, torch.where(some, key_values(key), torch.inf)
