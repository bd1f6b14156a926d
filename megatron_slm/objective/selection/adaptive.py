"""Adaptive selection ratio, guided by the risk of the selected tokens.

At confidence α the value at risk of the scores is their α-quantile. The tokens above it are a top-k with k = 1 − α, and
their mean score is the conditional value at risk. ESLM (arXiv 2505.19893) selects by the value at risk, and its variant
Ada-ESLM adapts α during training. Its update rule could not be confirmed, so this one is independent of it:

    riskₜ  =  mean score of the tokens that step t selected, in nats
    kₜ₊₁   =  kₜ · exp(γ · (riskₜ − riskₜ₋₁)), within bounds

If the risk rises, more tokens are selected, and fewer if it falls. A larger k lowers the risk, so the rule is stable
if γ is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy, HostMask
from megatron_slm.objective.scores import ranking_scores
from megatron_slm.objective.selection.exact import Selection
from megatron_slm.objective.selection.policy import TopK
from megatron_slm.objective.selection.strategies import SelectionStrategy
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch
from megatron_slm.runtime.collective import all_reduce_sum, broadcast_from_last_stage

DIGITS = 6  # of the ratio, so that rounding of sums over ranks does not change it
LARGEST_CHANGE = 10.0  # of log k in one step


@dataclass(frozen=True)
class RatioRule:
    """Represent the rule for the next ratio."""

    gain: float  # γ, in 1/nats
    lowest: float
    highest: float

    def next_ratio(self, ratio: float, risk: float, risk_before: float) -> float:
        """Return kₜ₊₁; the ratio remains if a risk is unknown (NaN) or infinite."""
        change = risk - risk_before
        if math.isfinite(change):
            ratio *= math.exp(min(max(self.gain * change, -LARGEST_CHANGE), LARGEST_CHANGE))
        return self.bounded(round(ratio, DIGITS))

    def bounded(self, ratio: float) -> float:
        """Return the nearest ratio within the bounds."""
        return min(max(ratio, self.lowest), self.highest)


class AdaptiveSelection(SelectionStrategy):
    """Select by another strategy, and adapt its ratio after each step; the first step has the run's ratio."""

    def __init__(self, inner: SelectionStrategy, rule: RatioRule) -> None:
        super().__init__(inner.config, inner.device)
        assert isinstance(inner.config.policy, TopK), "checked by training.preflight"
        self.inner, self.rule, self.top_k = inner, rule, inner.config.policy
        self.first: float | None = None  # the run's ratio, with which the adaptation began
        self.adapted: float | None = None  # ratio of the next step
        self.risk = math.nan  # of the last step
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # scores and number of selected tokens

    def begin_step(self, ratio: float, next_ratio: float, ranking_pass: Callable[[], Sequence[TokenBatch]]) -> bool:
        if self.first not in (None, ratio):
            self.adapted, self.risk = None, math.nan  # a resume changed the run's ratio, and begins with it
        self.first = ratio
        self.ratio = ratio if self.adapted is None else self.rule.bounded(self.adapted)  # a resume may change bounds
        return self.inner.begin_step(self.ratio, self.ratio, ranking_pass)

    def forward_grad_policy(
        self,
        micro_batch_index: int,
        valid: Tensor,
        global_token_index: Tensor,
        reference: ReferenceScores | None,
        valid_on_host: HostMask | None = None,
    ) -> ForwardGradPolicy | None:
        return self.inner.forward_grad_policy(micro_batch_index, valid, global_token_index, reference, valid_on_host)

    def select(self, micro_batch_index: int, tokens: TokenBatch) -> Selection:
        selection = self.inner.select(micro_batch_index, tokens)
        scores = ranking_scores(tokens, self.config, self.top_k).double()
        self.sums += torch.stack((scores.masked_fill(~selection.selected, 0.0).sum(), selection.selected.sum()))
        return selection

    def end_step(self) -> None:
        self.inner.end_step()
        sums = broadcast_from_last_stage(all_reduce_sum(self.sums, self.config.dp_cp_group), self.config.pp_group)
        total, count = sums.tolist()
        risk = total / count if count else math.nan
        self.adapted = self.rule.next_ratio(self.ratio, risk, self.risk)
        self.risk = risk if math.isfinite(risk) else self.risk
        self.sums = torch.zeros_like(self.sums)

    def selected_share(self) -> float:
        return self.inner.selected_share()

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "ratio": self.adapted, "risk": self.risk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adapted, self.risk = state.get("ratio"), state.get("risk", math.nan)
        self.first = state.get("first")  # unknown in checkpoints of earlier releases
