"""The predicted threshold: selection over the global batch that needs no other tokens of the step.

When a step ends, its scores are known on all ranks, and so is the exact threshold that would have selected any share
of them. The next step's threshold is that of a share which compensates for the surplus selected so far, moved on by
the velocity of the thresholds:

    surplusₜ   = surplusₜ₋₁ + (shareₜ − kₜ)
    exactₜ(r)  = the exact threshold of step t's scores for the share r
    velocityₜ  = SMOOTHING · velocityₜ₋₁ + (1 − SMOOTHING) · (exactₜ(k) − exactₜ₋₁(k))
    threshold of step t + 1  =  exactₜ(k − GAIN · surplusₜ) + velocityₜ

Over n steps the mean share is off by the change of the surplus divided by n. Noise of a batch cancels in the surplus,
and a steady drift leaves none once its velocity is known. After a jump of J the mean share over n steps is off by
J / n: |J| ≤ 1/2 costs at most 1 % over 50 steps. This holds while the scores of a step move by less than their spread.

If many scores are equal to the threshold, it is not moved on, and a share of them is selected by a hash of the token's
index: ties do no harm either, and the selection of a token still depends on nothing but itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.objective.noise import TIES, uniform
from megatron_slm.objective.scores import ranking_scores
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import Selection, combine_masks, mixed_weight
from megatron_slm.objective.selection.policy import top_ks
from megatron_slm.objective.selection.threshold import key_values, largest_key, order_keys
from megatron_slm.objective.tokens import TokenBatch
from megatron_slm.runtime.collective import all_reduce_sum, broadcast_from_last_stage, group_size

GAIN = 0.7
SMOOTHING = 0.5
LARGEST_SURPLUS = 1.0  # anti-windup limit of the integral term
MANY_TIES = 0.001  # of the valid tokens


@dataclass(frozen=True)
class PredictedThreshold:
    """Thresholds of a step, known before its first forward pass."""

    thresholds: Tensor  # [t] fp32, one per top-k of the policy: scores as :func:`ranking_scores` returns them
    tied: Tensor  # [t] float64, share of the scores equal to the threshold that is selected
    share: Tensor  # scalar fp32, of the valid tokens that were selected in the step before


def select_by_threshold(tokens: TokenBatch, config: SelectionConfig, predicted: PredictedThreshold) -> Selection:
    """Select every token whose score reaches the predicted threshold; NaN is not selected. Nothing is communicated."""
    assert config.policy is not None
    selected = combine_masks(config.policy, iter(predicted_masks(tokens, config, predicted)))
    weight = selected.float()
    if config.mix:
        weight = mixed_weight(weight, tokens.valid, predicted.share, config.mix)
    return Selection(selected, weight, next(top_ks(config.policy)).sign * predicted.thresholds[0])


def predicted_masks(tokens: TokenBatch, config: SelectionConfig, predicted: PredictedThreshold) -> list[Tensor]:
    """Return the selection of each top-k, [b, s] bool."""
    assert config.policy is not None
    lowest = lowest_selected_scores(tokens.global_token_index, config, predicted)
    scores = (ranking_scores(tokens, config, top_k) for top_k in top_ks(config.policy))
    return [tokens.valid & (score >= least) for score, least in zip(scores, lowest, strict=True)]


def lowest_selected_scores(
    global_token_index: Tensor, config: SelectionConfig, predicted: PredictedThreshold
) -> list[Tensor]:
    """Return the lowest score with which each token is selected, by each top-k, [b, s] fp32.

    It is the threshold, or the next number above it. A hash of the token's index decides which, so that the right
    share of equal scores is selected.
    """
    hashed = uniform(global_token_index, config.seed, TIES)
    above = torch.nextafter(predicted.thresholds, torch.full_like(predicted.thresholds, torch.inf))
    each = zip(predicted.thresholds, above, predicted.tied, strict=True)
    return [torch.where(hashed < tied, threshold, next_above) for threshold, next_above, tied in each]


class _State(NamedTuple):
    """State of the controller, each [t] float64, which holds fp32 exactly: one value per top-k of the policy."""

    threshold: Tensor
    tied: Tensor  # share of the scores equal to the threshold that is selected
    surplus: Tensor
    exact: Tensor  # exact threshold of the last step
    velocity: Tensor
    share: Tensor  # of the valid tokens that the combined selection of the last step selected
    ratio: Tensor  # the run's selection ratio that the threshold is predicted for; NaN before the first step


class ThresholdPredictor:
    """Controller of one run's threshold; its state is a few numbers per top-k of the policy.

    A threshold serves the selection ratio that it was predicted for. Without one (the first step, or after the ratio
    or the policy was changed on a resume) the step is selected exactly.
    """

    def __init__(self, config: SelectionConfig, device: torch.device) -> None:
        assert config.policy is not None
        self.config = config
        self.top_ks = list(top_ks(config.policy))
        # The rows of a _State in one tensor, and thus in one message.
        self.values = torch.zeros(len(_State._fields), len(self.top_ks), dtype=torch.float64, device=device)
        self.values[-1] = torch.nan
        self.predicted_ratio = math.nan  # the last row, known without waiting for the device

    @property
    def share(self) -> float:
        """Return the share of the valid tokens that the last step selected."""
        return float(_State(*self.values).share[0])

    def predict(self, ratio: float) -> PredictedThreshold | None:
        """Return the thresholds of a step with this ratio; None if it must be selected exactly."""
        if self.predicted_ratio != ratio:
            return None
        state = _State(*self.values)
        return PredictedThreshold(state.threshold.float(), state.tied, state.share[0].float())

    def observe(self, tokens: TokenBatch, selected: Tensor, ratio: float, next_ratio: float) -> None:
        """Update the state from a step that has ended. Collective over the config's group.

        Args:
            tokens: all tokens of the step that are on this rank.
            selected: their selection, [b, s] bool.
            ratio: the step's selection ratio.
            next_ratio: that of the next step.
        """
        state, predicted = _State(*self.values), self.predict(ratio)
        n_valid, n_selected, n_reached = self._counts(tokens, selected, predicted)
        if not n_valid:
            return  # there is nothing to learn from
        surplus, velocity = state.surplus, state.velocity
        if predicted is not None:
            error = n_reached / n_valid - self._shares(ratio)
            surplus = (surplus + error).clamp(-LARGEST_SURPLUS, LARGEST_SURPLUS)
        now, aim = self._shares(ratio), self._shares(next_ratio)
        shares = [aim - GAIN * surplus, aim, *([now] if next_ratio != ratio else [])]
        exact, needed, ties = self._exact_thresholds(tokens, n_valid, torch.stack(shares))
        corrected = exact[0]
        if predicted is not None:
            change = (exact[-1] - state.exact).nan_to_num(0.0, 0.0, 0.0)  # at this step's ratio; scores may be infinite
            velocity = SMOOTHING * velocity + (1 - SMOOTHING) * change
            velocity = velocity.masked_fill(now >= 1, 0.0)  # the lowest of all scores is noise
        threshold = torch.where(ties[0] - 1 > MANY_TIES * n_valid, corrected, corrected + velocity)
        selects_all = aim >= 1
        state = _State(
            threshold=threshold.masked_fill(selects_all, -torch.inf).float(),
            tied=(needed[0] / ties[0]).masked_fill(selects_all, 1.0),
            surplus=surplus,
            exact=exact[1],
            velocity=velocity,
            share=(n_selected / n_valid).expand_as(aim),
            ratio=torch.full_like(aim, next_ratio),
        )
        self.values = torch.stack(state).double()
        self.predicted_ratio = next_ratio

    def broadcast(self, pipeline: ProcessGroup | None) -> None:
        """Copy the state of the last pipeline stage, which observed, to the others. Collective over the group."""
        if group_size(pipeline) > 1:
            self.predicted_ratio = float(broadcast_from_last_stage(self.values, pipeline)[-1, 0])

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = torch.tensor(state["values"], dtype=torch.float64, device=self.values.device)
        self.predicted_ratio = float(self.values[-1, 0])

    def _counts(self, tokens: TokenBatch, selected: Tensor, predicted: PredictedThreshold | None) -> tuple[Tensor, ...]:
        """Return the valid [1] and selected [1] tokens, and those above each threshold [t], int64 over all ranks."""
        n_reached = torch.zeros(len(self.top_ks), dtype=torch.int64, device=self.values.device)
        if predicted is not None:
            n_reached = torch.stack([mask.sum() for mask in predicted_masks(tokens, self.config, predicted)])
        counts = torch.cat((torch.stack((tokens.valid.sum(), selected.sum())), n_reached))
        return all_reduce_sum(counts, self.config.dp_cp_group).split((1, 1, len(self.top_ks)))

    def _exact_thresholds(self, tokens: TokenBatch, n_valid: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exact thresholds of each top-k for ``shares`` of the valid tokens.

        Args:
            tokens: all tokens of the step that are on this rank.
            n_valid: valid tokens of all ranks, [1] int64.
            shares: [n, t] float64.

        Returns:
            The thresholds, [n, t] float64, how many of the scores equal to a threshold belong to its share, and the
            number of such scores, [n, t] int64.
        """
        count = (shares.flatten() * n_valid).round().long().clamp(min=1).minimum(n_valid)
        scores = torch.stack([ranking_scores(tokens, self.config, top_k).flatten() for top_k in self.top_ks])
        valid = tokens.valid.reshape(1, -1).expand(len(count), -1)
        keys = order_keys(scores).repeat(len(shares), 1)
        key, needed, ties = largest_key(keys, valid, count, self.config.dp_cp_group)
        return key_values(key).double().view_as(shares), needed.view_as(shares), ties.view_as(shares)

    def _shares(self, ratio: float) -> Tensor:
        shares = [top_k.ratio or ratio for top_k in self.top_ks]
        # torch.tensor would wait for its copy to the device.
        return torch.stack([self.values.new_full((), share) for share in shares])
