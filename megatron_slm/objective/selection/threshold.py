"""The exact distributed top-k threshold: a radix select over order-preserving 32-bit keys.

Every rank holds some of the values of a ranking. Three all-reduced histograms (11, 11 and 10 bits of the key, highest
first) determine the key of the k-th largest value. The communication volume is constant: at most 3 x 2048 counts of 8
bytes per ranking, for any number of tokens. The result is the k-th largest of the gathered values, for any split over
ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.runtime.collective import all_reduce_sum

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of the three digits of a 32-bit key, highest first
SIGN = 1 << 31


def order_keys(values: Tensor) -> Tensor:
    """Return integers in the order of ``values`` (fp32), int32 in the same shape; -0.0 and 0.0 get the same key.

    The bits of a positive float, read as an integer, already sort as the floats do; those of a negative one sort
    backwards, so that all of them but the sign are flipped.
    """
    bits = (values.float() + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & (SIGN - 1))


def key_values(keys: Tensor) -> Tensor:
    """Return the fp32 values of the ``keys`` that :func:`order_keys` returned."""
    return (keys ^ ((keys >> 31) & (SIGN - 1))).view(torch.float32)


def largest_key(
    keys: Tensor, candidates: Tensor, count: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count``-th largest key of each ranking over all ranks.

    Args:
        keys: [r, n] int32; n may differ between ranks, and be 0.
        candidates: [r, n] bool, the keys that take part.
        count: [r] int64, at least 1, the same on every rank; the result is undefined if fewer keys take part.
        group: the ranks that share the rankings.

    Returns:
        the key, [r] int32; how many of the keys equal to it belong to the ``count`` largest, and how many such keys
        there are, both [r] int64 and over all ranks.
    """
    remaining = count.clone()
    found = torch.zeros_like(count)
    for shift, bits in DIGITS:
        digit = (keys >> shift) & ((1 << bits) - 1)
        if shift + bits == 32:
            digit ^= 1 << (bits - 1)  # the sign: negative keys come first
        histogram = all_reduce_sum(_histograms(digit, candidates, 1 << bits), group)
        at_least = histogram.flip(1).cumsum(1).flip(1)  # keys whose digit is this or larger
        chosen = ((at_least >= remaining[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)  # 0 if no key takes part
        equal = histogram.gather(1, chosen).squeeze(1)
        remaining = remaining - (at_least.gather(1, chosen).squeeze(1) - equal)
        found = (found << bits) | chosen.squeeze(1)
        candidates = candidates & (digit == chosen)
    return (found - SIGN).int(), remaining, equal


def select_highest(
    scores: Tensor, valid: Tensor, count: Tensor, order: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Select exactly the ``count`` highest valid scores of each ranking.

    Scores that are equal at the threshold are taken in increasing ``order``, so that the selection depends on the
    tokens and not on their distribution over ranks. Only if there may be such ties, the threshold of ``order`` is
    computed as well; the decision depends on global counts, so that all ranks agree.

    Args:
        scores: [r, n] fp32 without NaN, r rankings; infinities are allowed.
        valid: [r, n] bool.
        count: [r] int64, at most the number of valid scores over all ranks, the same on every rank.
        order: [r, n] int64 in [0, 2^31), different for all tokens of a ranking.
        group: ranks that share the rankings; None ranks only local values.

    Returns:
        selected [r, n] bool, and threshold [r] fp32: the lowest selected score (+inf if count is 0).
    """
    is_nonempty = count > 0
    keys = order_keys(scores)
    key, needed, ties = largest_key(keys, valid, count.clamp(min=1), group)
    tied = valid & (keys == key[:, None])
    selected = valid & (keys > key[:, None])
    if _may_have_ties(is_nonempty & (ties > needed)):
        reverse = ~order.int()  # the lowest order has the largest key
        last, _, _ = largest_key(reverse, tied, needed.minimum(ties).clamp(min=1), group)
        tied &= reverse >= last[:, None]
    selected = (selected | tied) & is_nonempty[:, None]
    return selected, torch.where(is_nonempty, key_values(key), torch.inf)


def _may_have_ties(has_ties: Tensor) -> bool:
    """Return whether a ranking has ties, [r] bool; always True on a GPU, since the host would wait for the answer."""
    return has_ties.device.type != "cpu" or bool(has_ties.any())


def _histograms(digit: Tensor, candidates: Tensor, bins: int) -> Tensor:
    """Count each digit, [r, n] int32 in [0, bins), in each ranking; return [r, bins] int64."""
    rankings = digit.size(0)
    first = torch.arange(0, rankings * bins, bins, dtype=torch.int32, device=digit.device)
    nowhere = rankings * bins
    indices = torch.where(candidates, digit + first[:, None], nowhere).flatten()
    if indices.device.type == "cpu":
        counts = torch.bincount(indices, minlength=nowhere + 1)
    else:  # there, bincount would wait for the device
        ones = torch.ones_like(indices, dtype=torch.int64)
        counts = torch.zeros(nowhere + 1, dtype=torch.int64, device=indices.device).scatter_add_(
            0, indices.long(), ones
        )
    return counts[:nowhere].view(rankings, bins)
