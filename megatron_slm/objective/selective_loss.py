"""Selective Language Modeling in one place: scores, ranking, selection, loss (Rho-1, section 2.2).

    excess lossᵢ  =  token lossᵢ − reference lossᵢ
    selectedᵢ     =  1 where i is among the ⌈k · valid⌉ tokens of the scope with the highest score
    SLM loss      =  Σ selectedᵢ · token lossᵢ  ÷  Σ selectedᵢ,    both summed over the global batch

This module gives the numerator and the count of one micro-batch; the trainer sums both over micro-batches and ranks
and divides once. So the loss does not depend on how a batch is cut. Causal language modeling is k = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.noise import gumbel, uniform
from megatron_slm.objective.policy import Joined, Policy, Term
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
    scope: str = "data-parallel"  # or "sequence", "micro-batch"
    group: ProcessGroup | None = None  # data- and context-parallel ranks, which share a micro-batch step
    mix: float = 0.0  # share of the weight that is spread evenly over all valid tokens
    seed: int = 1234  # of random and stochastic scores
    temperature: float = 1.0  # of stochastic scores


@dataclass(frozen=True)
class Tokens:
    """One micro-batch as the objective sees it; all [b, s]."""

    loss: Tensor  # fp32 token losses of the training model, with their graph
    valid: Tensor  # bool, the loss mask
    index: Tensor  # int64, place of the token in the run: sample index · s + position
    order: Tensor  # int64, the same counted from the first token of this micro-batch step over all ranks
    reference: ReferenceScores | None = None


@dataclass(frozen=True)
class SelectiveLoss:
    """One micro-batch's part of the loss."""

    numerator: Tensor  # scalar fp32 with its graph: Σ weightᵢ · token lossᵢ
    count: Tensor  # scalar int64: selected tokens here; the weights of a scope sum up to its count
    selected: Tensor  # [b, s] bool
    threshold: Tensor  # scalar fp32: lowest selected score of the first term, averaged over rankings here


def selective_loss(tokens: Tokens, selector: Selector, ratio: float) -> SelectiveLoss:
    """Score, rank and select the tokens of one micro-batch. Collective over ``selector.group``.

    Args:
        tokens: the micro-batch; a score from the reference model needs ``tokens.reference``.
        selector: what to rank by, and together with what.
        ratio: the share k of the valid tokens that is selected.

    Raises:
        DivergedError: a token loss or reference loss of a valid token is NaN or infinite, here or elsewhere in the
            scope; the rank that holds it names the place.
    """
    rows, group = _rankings(selector)
    n_valid = _count_valid(tokens, rows, group)
    if selector.policy is None:
        selected, threshold = tokens.valid, torch.full_like(n_valid, -torch.inf, dtype=torch.float32)
    else:
        selected, threshold = _Ranking(tokens, selector, rows, group, n_valid, ratio).select(selector.policy)
        selected = selected.view_as(tokens.valid)
    weights = _weights(selected, tokens.valid, rows, selector.mix, n_valid, group)
    numerator = (tokens.loss.masked_fill(weights == 0, 0.0) * weights).sum()
    return SelectiveLoss(numerator, selected.sum(), selected, threshold.mean())


def selected_count(ratio: float, n_valid: Tensor) -> Tensor:
    """⌈ratio · n_valid⌉ with the decimal number that the user typed, free of binary rounding; int64."""
    share = Fraction(str(ratio)).limit_denominator(10**9)
    return -(n_valid * -share.numerator // share.denominator)


def _rankings(selector: Selector) -> tuple[bool, ProcessGroup | None]:
    """Whether each sequence is a ranking of its own, and the group that shares a ranking."""
    return selector.scope == "sequence", selector.group if selector.scope == "data-parallel" else None


def _as_rankings(values: Tensor, rows: bool) -> Tensor:
    """[b, s] as rankings: [b, s] where each sequence is one, else [1, b · s]."""
    return values if rows else values.reshape(1, -1)


def _count_valid(tokens: Tokens, rows: bool, group: ProcessGroup | None) -> Tensor:
    """Valid tokens of each ranking, [r] int64; the same message carries the number of losses that diverged."""
    diverged = tokens.valid & ~tokens.loss.detach().isfinite()
    if tokens.reference is not None:
        diverged |= tokens.valid & ~tokens.reference.loss.isfinite()
    counts = torch.cat((_as_rankings(tokens.valid, rows).sum(1), diverged.sum()[None]))
    all_reduce_sum(counts, group)
    if counts[-1]:
        raise DivergedError(_describe_divergence(tokens, diverged, int(counts[-1])))
    return counts[:-1]


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


@dataclass(frozen=True)
class _Ranking:
    """Evaluates a policy over the rankings of one micro-batch."""

    tokens: Tokens
    selector: Selector
    rows: bool
    group: ProcessGroup | None
    n_valid: Tensor  # [r]
    ratio: float

    def select(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """Selected tokens [r, n] bool, and the threshold of the first term [r] fp32."""
        if isinstance(policy, Joined):
            (left, threshold), (right, _) = self.select(policy.left), self.select(policy.right)
            return (left & right if policy.how == "and" else left | right), threshold
        scores = policy.sign * self._score(policy)
        valid, order = _as_rankings(self.tokens.valid, self.rows), _as_rankings(self.tokens.order, self.rows)
        count = selected_count(policy.ratio or self.ratio, self.n_valid)
        scores = _as_rankings(scores.float(), self.rows).masked_fill(~valid, 0.0)
        selected, threshold = select_highest(scores, valid, count, order, self.group)
        return selected, policy.sign * threshold

    def _score(self, term: Term) -> Tensor:
        """The score of every token, [b, s]; where the lowest are selected, the noise is subtracted."""
        score = self._plain_score(term.score)
        if not term.stochastic:
            return score
        noise = gumbel(self.tokens.index, self.selector.seed, stream=1)
        return score.double() / self.selector.temperature + term.sign * noise

    def _plain_score(self, name: str) -> Tensor:
        tokens, reference = self.tokens, self.tokens.reference
        if name == "random":
            return uniform(tokens.index, self.selector.seed, stream=0)
        if name == "token-loss":
            return tokens.loss.detach()
        assert reference is not None, f"the score {name} needs a reference model"
        if name == "reference-entropy":
            assert reference.entropy is not None, "the reference model was built without entropies"
            return reference.entropy
        return reference.loss if name == "reference-loss" else tokens.loss.detach() - reference.loss


def _weights(
    selected: Tensor, valid: Tensor, rows: bool, mix: float, n_valid: Tensor, group: ProcessGroup | None
) -> Tensor:
    """Weight of each token's loss, [b, s] fp32: 1 where selected, or with a mix m

        (1 − m) · selectedᵢ  +  m · (selected ÷ valid, of the ranking) · validᵢ,

    whose sum over a ranking is still the number of selected tokens."""
    if mix == 0:
        return selected.float()
    n_selected = all_reduce_sum(_as_rankings(selected, rows).sum(1), group)
    even = (n_selected / n_valid.clamp(min=1)).float()
    spread = even[:, None] if rows else even
    return (1 - mix) * selected.float() + mix * spread * valid.float()
