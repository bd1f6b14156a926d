"""Selective Language Modeling in one place: scores, ranking, selection, loss (Rho-1, section 2.2).

    excess lossᵢ  =  token lossᵢ − reference lossᵢ
    selectedᵢ     =  1 where i is among the ⌈k · valid⌉ tokens of the scope with the highest score
    SLM loss      =  Σ selectedᵢ · token lossᵢ  ÷  Σ selectedᵢ,    both summed over the global batch

This module gives the numerator and the count of one micro-batch; the trainer sums both over micro-batches and ranks
and divides once. So the loss does not depend on how a batch is cut. Causal language modeling is k = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.noise import gumbel, uniform
from megatron_slm.objective.policy import Policy, Term, terms
from megatron_slm.objective.threshold import all_reduce_sum, select_highest
from megatron_slm.runtime.errors import DivergedError


@dataclass(frozen=True)
class ReferenceScores:
    """What the reference model says of the tokens of one micro-batch."""

    loss: Tensor  # [b, s] fp32
    entropy: Tensor | None = None  # [b, s] fp32, nats


@dataclass(frozen=True)
class Selector:
    """The settings of a selection; ``policy`` None selects every valid token (CLM)."""

    policy: Policy | None
    scope: str = "data-parallel"  # or "sequence", "micro-batch", "global-batch"
    group: ProcessGroup | None = None  # data- and context-parallel ranks, which share a micro-batch step
    context: ProcessGroup | None = None  # context-parallel ranks, which share a micro-batch and its sequences
    mix: float = 0.0  # share of the weight that is spread evenly over all valid tokens
    seed: int = 1234  # of random and stochastic scores
    temperature: float = 1.0  # of stochastic scores
    heads_weight: float = 0.0  # of the further heads of multi-token prediction together
    heads_select: bool = False  # whether those rank their own losses, or follow the main head


@dataclass(frozen=True)
class Tokens:
    """One micro-batch as the objective sees it, or several as one (:func:`as_one`); all [b, s]."""

    loss: Tensor  # fp32 token losses of the training model, with their graph
    valid: Tensor  # bool, the loss mask
    index: Tensor  # int64, place of the token in the run: sample index · s + position
    order: Tensor  # int64, the same counted from the first token of the optimizer step
    reference: ReferenceScores | None = None


@dataclass(frozen=True)
class Selection:
    """Which tokens of one micro-batch get a gradient."""

    selected: Tensor  # [b, s] bool
    weight: Tensor  # [b, s] fp32, of each token's loss; the weights of a scope sum up to its selected tokens
    threshold: Tensor  # scalar fp32: lowest selected score of the first term, averaged over rankings here

    def split(self, parts: int) -> list[Selection]:
        """The selections of the micro-batches that :func:`as_one` joined."""
        pairs = zip(self.selected.chunk(parts), self.weight.chunk(parts), strict=True)
        return [Selection(selected, weight, self.threshold) for selected, weight in pairs]


@dataclass(frozen=True)
class Carried:
    """What a step knows of its selection before its first forward pass."""

    thresholds: Tensor  # [t] fp32, one per term of the policy: scores as :func:`term_scores` gives them
    tied: Tensor  # [t] float64, share of the scores equal to the threshold that is selected
    share: Tensor  # scalar fp32, of the valid tokens that were selected in the step before


@dataclass(frozen=True)
class SelectiveLoss:
    """One micro-batch's part of the loss."""

    numerator: Tensor  # scalar fp32 with its graph: Σ weightᵢ · token lossᵢ
    count: Tensor  # scalar int64: selected tokens here
    selected: Tensor  # [b, s] bool
    threshold: Tensor  # scalar fp32, of the selection


def selective_loss(tokens: Tokens, selection: Selection) -> SelectiveLoss:
    """The micro-batch's part of the loss."""
    weight = selection.weight
    numerator = (tokens.loss.masked_fill(weight == 0, 0.0) * weight).sum()
    return SelectiveLoss(numerator, selection.selected.sum(), selection.selected, selection.threshold)


def select(tokens: Tokens, selector: Selector, ratio: float) -> Selection:
    """Score and rank tokens, and select exactly ⌈k · valid⌉ of each ranking. Collective over ``selector.group``.

    Args:
        tokens: the micro-batch, or with the scope "global-batch" all micro-batches of the step as one; a score from
            the reference model needs ``tokens.reference``.
        selector: what to rank by, and together with what.
        ratio: the share k of the valid tokens that is selected.

    Raises:
        DivergedError: a token loss or reference loss of a valid token is NaN or infinite, here or elsewhere in the
            scope; the rank that holds it names the place.
    """
    rows, group = _rankings(selector)
    valid, order = _as_rankings(tokens.valid, rows), _as_rankings(tokens.order, rows)
    n_valid = all_reduce_counts(tokens, valid.sum(1), group)
    if selector.policy is None:
        return Selection(tokens.valid, tokens.valid.float(), torch.full((), -torch.inf, device=valid.device))
    parts, thresholds = [], []
    for term in terms(selector.policy):
        scores = _as_rankings(term_scores(tokens, selector, term), rows)
        count = selected_count(term.ratio or ratio, n_valid)
        chosen, threshold = select_highest(scores, valid, count, order, group)
        parts.append(chosen)
        thresholds.append(term.sign * threshold.mean())
    selected = joined(selector.policy, iter(parts))
    weight = selected.float()
    if selector.mix:
        share = (all_reduce_sum(selected.sum(1), group) / n_valid.clamp(min=1)).float()
        weight = _mixed(weight, valid, share[:, None], selector.mix)
    return Selection(selected.view_as(tokens.valid), weight.view_as(tokens.valid), thresholds[0])


def select_carried(tokens: Tokens, selector: Selector, carried: Carried) -> Selection:
    """Select every token whose score reaches the threshold that the steps before left. Nothing is communicated, and
    nothing is known of other tokens.

    A loss that is NaN is not selected; :meth:`CarriedThreshold.observe` finds it when the step ends.
    """
    assert selector.policy is not None
    selected = joined(selector.policy, iter(carried_selections(tokens, selector, carried)))
    weight = selected.float()
    if selector.mix:
        weight = _mixed(weight, tokens.valid, carried.share, selector.mix)
    return Selection(selected, weight, next(terms(selector.policy)).sign * carried.thresholds[0])


def carried_selections(tokens: Tokens, selector: Selector, carried: Carried) -> list[Tensor]:
    """The selection of each term, [b, s] bool."""
    assert selector.policy is not None
    lowest = carried_lowest(tokens.index, selector, carried)
    scores = (term_scores(tokens, selector, term) for term in terms(selector.policy))
    return [tokens.valid & (score >= least) for score, least in zip(scores, lowest, strict=True)]


def carried_lowest(index: Tensor, selector: Selector, carried: Carried) -> list[Tensor]:
    """The lowest score with which each token is selected, by each term, [b, s] fp32: the threshold, or the next number
    above it. A hash of the token's index draws which, so that the right share of equal scores is selected."""
    drawn = uniform(index, selector.seed, stream=2)
    above = torch.nextafter(carried.thresholds, torch.full_like(carried.thresholds, torch.inf))
    each = zip(carried.thresholds, above, carried.tied, strict=True)
    return [torch.where(drawn < tied, threshold, next_above) for threshold, next_above, tied in each]


def as_one(micro_batches: Sequence[Tokens]) -> Tokens:
    """The tokens of several micro-batches of one size as those of one, without their graph."""

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(tokens, name).detach() for tokens in micro_batches])

    references = [tokens.reference for tokens in micro_batches if tokens.reference is not None]
    entropies = [reference.entropy for reference in references if reference.entropy is not None]
    reference = None
    if references:
        loss = torch.cat([reference.loss for reference in references])
        reference = ReferenceScores(loss, torch.cat(entropies) if entropies else None)
    return Tokens(whole("loss"), whole("valid"), whole("index"), whole("order"), reference)


def selected_count(ratio: float, n_valid: Tensor) -> Tensor:
    """⌈ratio · n_valid⌉ with the decimal number that the user typed, free of binary rounding; int64."""
    share = Fraction(str(ratio)).limit_denominator(10**9)
    return -(n_valid * -share.numerator // share.denominator)


def term_scores(tokens: Tokens, selector: Selector, term: Term) -> Tensor:
    """What a term ranks by, [b, s] fp32: the highest are selected, so that a score of which the lowest are wanted
    changes its sign. 0 for tokens that are not valid."""
    score = _plain_score(tokens, selector, term.score)
    if term.stochastic:
        noise = gumbel(tokens.index, selector.seed, stream=1)
        score = score.double() / selector.temperature + term.sign * noise
    return (term.sign * score).float().masked_fill(~tokens.valid, 0.0)


def joined(policy: Policy, parts: Iterator[Tensor]) -> Tensor:
    """The selections of the terms, from left to right, joined as the policy says."""
    if isinstance(policy, Term):
        return next(parts)
    left, right = joined(policy.left, parts), joined(policy.right, parts)
    return left & right if policy.how == "and" else left | right


def all_reduce_counts(tokens: Tokens, counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """``counts`` [c] int64 summed over the group; the same message carries the number of losses that diverged.

    Raises:
        DivergedError: a loss of a valid token is NaN or infinite, on any rank.
    """
    diverged = tokens.valid & ~tokens.loss.detach().isfinite()
    if tokens.reference is not None:
        diverged |= tokens.valid & ~tokens.reference.loss.isfinite()
    summed = all_reduce_sum(torch.cat((counts, diverged.sum()[None])), group)
    if summed[-1]:
        raise DivergedError(_describe_divergence(tokens, diverged, int(summed[-1])))
    return summed[:-1]


def _rankings(selector: Selector) -> tuple[bool, ProcessGroup | None]:
    """Whether each sequence is a ranking of its own, and the group that shares a ranking."""
    shared = selector.scope in ("data-parallel", "global-batch")
    return selector.scope == "sequence", selector.group if shared else selector.context


def _as_rankings(values: Tensor, rows: bool) -> Tensor:
    """[b, s] as rankings: [b, s] where each sequence is one, else [1, b · s]."""
    return values if rows else values.reshape(1, -1)


def _describe_divergence(tokens: Tokens, diverged: Tensor, total: int) -> str:
    places = diverged.nonzero()
    if not len(places):
        return f"{total} losses on other ranks are NaN or infinite."
    row, position = (int(number) for number in places[0])
    loss = float(tokens.loss[row, position])
    values = f"token loss {loss}"
    if tokens.reference is not None:
        values += f", reference loss {float(tokens.reference.loss[row, position])}"
    return f"{total} losses are NaN or infinite; the first here is row {row}, position {position}: {values}."


def _plain_score(tokens: Tokens, selector: Selector, name: str) -> Tensor:
    reference = tokens.reference
    if name == "random":
        return uniform(tokens.index, selector.seed, stream=0)
    if name == "token-loss":
        return tokens.loss.detach()
    assert reference is not None, f"the score {name} needs a reference model"
    if name == "reference-entropy":
        assert reference.entropy is not None, "the reference model was built without entropies"
        return reference.entropy
    return reference.loss if name == "reference-loss" else tokens.loss.detach() - reference.loss


def _mixed(weight: Tensor, valid: Tensor, share: Tensor, mix: float) -> Tensor:
    """With a mix m, the weight of each token's loss is

        (1 − m) · selectedᵢ  +  m · (selected ÷ valid, of the ranking) · validᵢ,

    whose sum over a ranking is still the number of selected tokens."""
    return (1 - mix) * weight + mix * share * valid.float()
