"""Exact selection: the ⌈k · valid⌉ tokens with the highest score of each ranking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.scores import ranking_scores
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.policy import Policy, TopK, top_ks
from megatron_slm.objective.selection.threshold import select_highest
from megatron_slm.objective.tokens import TokenBatch
from megatron_slm.runtime.collective import all_reduce_sum

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Selection:
    """Tokens of one micro-batch that get a gradient, and the weights of their losses."""

    selected: Tensor  # [b, s] bool
    weight: Tensor  # [b, s] fp32, of each token's loss; the weights of a scope sum up to its selected tokens
    threshold: Tensor  # scalar fp32: score of the last selected token of the first top-k, averaged over rankings here

    def split(self, count: int) -> list[Selection]:
        """Return the selections of the micro-batches that :func:`concat_micro_batches` concatenated."""
        pairs = zip(self.selected.chunk(count), self.weight.chunk(count), strict=True)
        return [Selection(selected, weight, self.threshold) for selected, weight in pairs]


def select(tokens: TokenBatch, config: SelectionConfig, ratio: float) -> Selection:
    """Score and rank tokens, and select exactly ⌈k · valid⌉ of each ranking. Collective over ``config.dp_cp_group``.

    Args:
        tokens: the micro-batch, or with the scope "global-batch" all micro-batches of the step concatenated; a score
            from the reference model needs ``tokens.reference``.
        config: settings of the selection.
        ratio: the share k of the valid tokens that is selected.
    """
    by_row, group = _rankings(config)
    valid, order = _as_rankings(tokens.valid, by_row), _as_rankings(tokens.step_token_index, by_row)
    n_valid = all_reduce_sum(valid.sum(1), group)
    if config.policy is None:
        return Selection(tokens.valid, tokens.valid.float(), torch.full((), -torch.inf, device=valid.device))
    masks, thresholds = [], []
    for top_k in top_ks(config.policy):
        scores = _as_rankings(ranking_scores(tokens, config, top_k), by_row)
        count = selected_count(top_k.ratio or ratio, n_valid)
        mask, threshold = select_highest(scores, valid, count, order, group)
        masks.append(mask)
        thresholds.append(top_k.sign * threshold.mean())
    selected = combine_masks(config.policy, iter(masks))
    weight = selected.float()
    if config.mix:
        share = (all_reduce_sum(selected.sum(1), group) / n_valid.clamp(min=1)).float()
        weight = mixed_weight(weight, valid, share[:, None], config.mix)
    return Selection(selected.view_as(tokens.valid), weight.view_as(tokens.valid), thresholds[0])


def selected_count(ratio: float, n_valid: Count) -> Count:
    """Return ⌈ratio · n_valid⌉ for the decimal number that the user typed, free of binary rounding; int64."""
    share = Fraction(str(ratio)).limit_denominator(10**9)
    return -(n_valid * -share.numerator // share.denominator)


def combine_masks(policy: Policy, masks: Iterator[Tensor]) -> Tensor:
    """Combine the masks of the policy's top-ks, given from left to right."""
    if isinstance(policy, TopK):
        return next(masks)
    left, right = combine_masks(policy.left, masks), combine_masks(policy.right, masks)
    return left & right if policy.operator == "and" else left | right


def mixed_weight(weight: Tensor, valid: Tensor, share: Tensor, mix: float) -> Tensor:
    """Return the weight of each token's loss with a mix m; the sum over a ranking is the number of selected tokens.

    (1 − m) · selectedᵢ  +  m · (selected ÷ valid, of the ranking) · validᵢ
    """
    return (1 - mix) * weight + mix * share * valid.float()


def _rankings(config: SelectionConfig) -> tuple[bool, ProcessGroup | None]:
    """Return whether each sequence is a ranking, and the group that shares a ranking."""
    shared = config.scope in ("data-parallel", "global-batch")
    return config.scope == "sequence", config.dp_cp_group if shared else config.cp_group


def _as_rankings(values: Tensor, by_row: bool) -> Tensor:
    """Return [b, s] as rankings: [b, s] if each sequence is one, else [1, b · s]."""
    return values if by_row else values.reshape(1, -1)
