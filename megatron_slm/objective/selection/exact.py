"""Exact selection: the ⌈k · valid⌉ tokens with the highest score of each ranking.

A ranking is a sequence or the scope. If corpora of a blend have ratios, the tokens of each corpus in the scope are a
ranking.
"""

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
from megatron_slm.runtime.collective import all_reduce_max, all_reduce_sum

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
    if config.policy is None:
        return Selection(tokens.valid, tokens.valid.float(), torch.full((), -torch.inf, device=tokens.valid.device))
    rankings = _rankings(tokens, config)
    masks, thresholds = [], []
    for top_k in top_ks(config.policy):
        scores = rankings.arrange(ranking_scores(tokens, config, top_k))
        count = rankings.counts(top_k.ratio or ratio)
        mask, threshold = select_highest(scores, rankings.valid, count, rankings.order, rankings.group)
        masks.append(mask)
        mean = threshold.masked_fill(count == 0, torch.nan).nanmean()  # NaN if nothing is selected
        thresholds.append(top_k.sign * torch.where(mean.isnan(), torch.inf, mean))
    selected = combine_masks(config.policy, iter(masks))
    weight = selected.float()
    if config.weight_temperature is not None or config.mix:
        n_selected = all_reduce_sum(selected.sum(1), rankings.group)
        if config.weight_temperature is not None:
            weight = softmax_weight(scores, selected, n_selected, config.weight_temperature, rankings.group)
        if config.mix:
            share = (n_selected / rankings.n_valid.clamp(min=1)).float()
            weight = mixed_weight(weight, rankings.valid, share[:, None], config.mix)
    return Selection(rankings.restore(selected), rankings.restore(weight), thresholds[0])


def selected_count(ratio: float, n_valid: Count) -> Count:
    """Return ⌈ratio · n_valid⌉ for the decimal number that the user typed, free of binary rounding; int64."""
    share = Fraction(str(ratio)).limit_denominator(10**9) or Fraction(1, 10**9)
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


def softmax_weight(
    scores: Tensor, selected: Tensor, n_selected: Tensor, temperature: float, group: ProcessGroup | None
) -> Tensor:
    """Return the weight of each token's loss by the softmax of its score over the selected tokens of its ranking.

    n_selected · exp(scoreᵢ / T) ÷ Σ exp(scoreⱼ / T), over the selected tokens j; the sum over a ranking is n_selected.

    Args:
        scores: [r, n] fp32, r rankings.
        selected: [r, n] bool.
        n_selected: [r] int64, over all ranks.
        temperature: T; the weights approach 1 as it grows.
        group: ranks that share the rankings.
    """
    logits = scores.double().masked_fill(~selected, -torch.inf)
    highest = all_reduce_max(logits.amax(1), group)
    exponentials = ((logits - highest[:, None]) / temperature).exp().masked_fill(~selected, 0.0)
    total = all_reduce_sum(exponentials.sum(1), group)
    return (exponentials * (n_selected / total.clamp(min=1))[:, None]).float()  # the highest score adds 1 to the total


@dataclass(frozen=True)
class _Rankings:
    """Represent tokens as r separate rankings: the sequences, or the scope, or the corpora of the scope."""

    tokens: TokenBatch
    by_sequence: bool
    valid: Tensor  # [r, n] bool
    n_valid: Tensor  # [r] int64, over all ranks
    corpus: Tensor | None  # [r] int64, if each corpus has a ratio
    corpus_ratios: tuple[float | None, ...]
    group: ProcessGroup | None  # ranks that share the rankings

    @property
    def order(self) -> Tensor:
        """Return the order in which equal scores are selected, [r, n] int64."""
        return self.arrange(self.tokens.step_token_index)

    def arrange(self, values: Tensor) -> Tensor:
        """Return values of all tokens [b, s] for each ranking, [r, n]; the corpora of a scope share them."""
        return values if self.by_sequence else values.reshape(1, -1).expand(len(self.valid), -1)

    def restore(self, values: Tensor) -> Tensor:
        """Return values of the rankings [r, n], 0 outside of each, as [b, s]."""
        return values if self.by_sequence else values.sum(0, dtype=values.dtype).view_as(self.tokens.valid)

    def counts(self, ratio: float) -> Tensor:
        """Return the number of tokens to select from each ranking, [r] int64, if the run's ratio is ``ratio``."""
        if self.corpus is None:
            return selected_count(ratio, self.n_valid)
        each = [selected_count(corpus_ratio or ratio, self.n_valid) for corpus_ratio in self.corpus_ratios]
        return torch.stack(each).gather(0, self.corpus[None])[0]


def _rankings(tokens: TokenBatch, config: SelectionConfig) -> _Rankings:
    """Divide tokens into rankings. Collective over ``config.dp_cp_group``."""
    by_sequence, shared = config.scope == "sequence", config.scope in ("data-parallel", "global-batch")
    group = config.dp_cp_group if shared else config.cp_group
    valid = tokens.valid if by_sequence else tokens.valid.reshape(1, -1)
    corpus = None
    if config.corpus_ratios:
        assert tokens.corpus is not None, "the samples come from one corpus"
        corpus = tokens.corpus
        if not by_sequence:
            of_token = corpus.repeat_interleave(tokens.valid.size(1))
            corpus = torch.arange(len(config.corpus_ratios), device=corpus.device)
            valid = valid & (of_token == corpus[:, None])
    n_valid = all_reduce_sum(valid.sum(1), group)
    return _Rankings(tokens, by_sequence, valid, n_valid, corpus, config.corpus_ratios, group)
