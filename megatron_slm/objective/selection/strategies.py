"""Selection strategies: how the tokens of a training step are selected.

========================  ======================================================================================
ExactSelection            ranks each micro-batch when its losses are known
GlobalBatchSelection      ranks all tokens of the step, from an additional forward pass
PredictedSelection        compares each token with a threshold predicted from earlier steps
AdaptiveSelection         one of the first two, with a ratio that adapts to the scores (adaptive.py)
========================  ======================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy, HostMask
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.exact import Selection, select
from megatron_slm.objective.selection.forward_grad import SpeculativeThreshold, build_forward_grad_policy
from megatron_slm.objective.selection.policy import TopK
from megatron_slm.objective.selection.predictor import (
    PredictedThreshold,
    ThresholdPredictor,
    lowest_selected_scores,
    select_by_threshold,
)
from megatron_slm.objective.tokens import ReferenceScores, TokenBatch, concat_micro_batches
from megatron_slm.runtime.collective import all_reduce_sum, broadcast_from_last_stage


class SelectionStrategy(ABC):
    """Selection of the tokens of one training step after another; its state belongs in the checkpoint."""

    config: SelectionConfig
    device: torch.device
    ratio: float = 1.0  # selection ratio of the step
    has_rank_state: bool = False  # whether each data-parallel rank has a state, or all ranks have the same
    legacy_key: str = ""  # key of the state in checkpoints of versions 0.1 and 0.2; "" if they have none

    def __init__(self, config: SelectionConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    def begin_step(self, ratio: float, next_ratio: float, ranking_pass: Callable[[], Sequence[TokenBatch]]) -> bool:
        """Prepare a step. Collective over all ranks.

        Args:
            ratio: the selection ratio of the step.
            next_ratio: that of the next step.
            ranking_pass: runs an additional forward pass; returns the tokens of each micro-batch on the last stage, and
                nothing elsewhere.

        Returns:
            whether the additional forward pass was run.
        """
        self.ratio = ratio
        return False

    @abstractmethod
    def forward_grad_policy(
        self,
        micro_batch_index: int,
        valid: Tensor,
        global_token_index: Tensor,
        reference: ReferenceScores | None,
        valid_on_host: HostMask | None = None,
    ) -> ForwardGradPolicy | None:
        """Return the rule for tokens whose gradient is computed in the forward pass."""

    @abstractmethod
    def select(self, micro_batch_index: int, tokens: TokenBatch) -> Selection:
        """Select the tokens of a micro-batch. Collective over the config's group if its scope needs that."""

    def end_step(self) -> None:
        """Update the state when all micro-batches have been selected. Collective over all ranks."""
        return

    @abstractmethod
    def selected_share(self) -> float:
        """Return the share of the step's valid tokens that will be selected, as far as it is known. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; empty if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        return


def build_strategy(
    config: SelectionConfig, device: torch.device, *, predicts: bool = False, speculates: bool = False
) -> SelectionStrategy:
    """Return the strategy of a configuration.

    Args:
        config: settings of the selection.
        device: device of its state.
        predicts: predict thresholds instead of ranking the global batch first.
        speculates: estimate the threshold of the next micro-batch, for gradients in the forward pass.
    """
    if predicts:
        return PredictedSelection(config, device)
    if config.scope == "global-batch" and config.policy is not None:
        return GlobalBatchSelection(config, device)
    return ExactSelection(config, device, speculates=speculates)


class ExactSelection(SelectionStrategy):
    """Rank each micro-batch when its losses are known, together with those of other ranks if the scope is shared."""

    has_rank_state = True
    legacy_key = "guess"  # former name of the speculative threshold

    def __init__(self, config: SelectionConfig, device: torch.device, *, speculates: bool = False) -> None:
        super().__init__(config, device)
        self.speculation = SpeculativeThreshold() if speculates else None

    def forward_grad_policy(
        self,
        micro_batch_index: int,
        valid: Tensor,
        global_token_index: Tensor,
        reference: ReferenceScores | None,
        valid_on_host: HostMask | None = None,
    ) -> ForwardGradPolicy | None:
        threshold = self.speculation.estimate() if self.speculation is not None else None
        return build_forward_grad_policy(
            self.config, self.ratio, valid, reference, valid_on_host=valid_on_host, threshold=threshold
        )

    def select(self, micro_batch_index: int, tokens: TokenBatch) -> Selection:
        selection = select(tokens, self.config, self.ratio)
        if self.speculation is not None:
            self.speculation.observe(selection.threshold)
        return selection

    def selected_share(self) -> float:
        policy = self.config.policy
        assert policy is None or isinstance(policy, TopK), "checked by training.preflight"
        return 1.0 if policy is None else policy.ratio or self.ratio

    def state_dict(self) -> dict[str, Any]:
        return self.speculation.state_dict() if self.speculation is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.speculation is not None:
            self.speculation.load_state_dict(state, self.device)


class GlobalBatchSelection(SelectionStrategy):
    """Rank all tokens of the step, from an additional forward pass, before the first backward pass."""

    def __init__(self, config: SelectionConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.ranked: Sequence[Selection] = ()
        self.ranked_on_host: Sequence[HostMask] = ()  # the selected tokens
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # selected and valid tokens on this rank

    def begin_step(self, ratio: float, next_ratio: float, ranking_pass: Callable[[], Sequence[TokenBatch]]) -> bool:
        self.ratio = ratio
        micro_batches = ranking_pass()
        if micro_batches:
            tokens = concat_micro_batches(micro_batches)
            selection = select(tokens, self.config, ratio)
            self.ranked = selection.split(len(micro_batches))
            self.ranked_on_host = np.split(selection.selected.cpu().numpy(), len(micro_batches))
            self.counts = torch.stack((selection.selected.sum(), tokens.valid.sum()))
        return True

    def forward_grad_policy(
        self,
        micro_batch_index: int,
        valid: Tensor,
        global_token_index: Tensor,
        reference: ReferenceScores | None,
        valid_on_host: HostMask | None = None,
    ) -> ForwardGradPolicy | None:
        return build_forward_grad_policy(
            self.config,
            self.ratio,
            valid,
            reference,
            valid_on_host=valid_on_host,
            selected=self.ranked[micro_batch_index].selected,
            selected_on_host=self.ranked_on_host[micro_batch_index],
        )

    def select(self, micro_batch_index: int, tokens: TokenBatch) -> Selection:
        return self.ranked[micro_batch_index]

    def end_step(self) -> None:
        self.ranked, self.ranked_on_host = (), ()

    def selected_share(self) -> float:
        counts = all_reduce_sum(self.counts.clone(), self.config.dp_cp_group)
        selected, valid = broadcast_from_last_stage(counts, self.config.pp_group).tolist()
        return selected / max(valid, 1)


class PredictedSelection(GlobalBatchSelection):
    """Select by a threshold predicted from earlier steps; a step without one is ranked exactly."""

    legacy_key = "carried"  # former name of the predicted threshold

    def __init__(self, config: SelectionConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.predictor = ThresholdPredictor(config, device)
        self.predicted: PredictedThreshold | None = None
        self.next_ratio = 1.0
        self.tokens: list[TokenBatch] = []  # of this step's micro-batches, and the masks of those selected
        self.masks: list[Tensor] = []

    def begin_step(self, ratio: float, next_ratio: float, ranking_pass: Callable[[], Sequence[TokenBatch]]) -> bool:
        self.ratio, self.next_ratio = ratio, next_ratio
        self.predicted = self.predictor.predict(ratio)
        self.tokens, self.masks = [], []
        return self.predicted is None and super().begin_step(ratio, next_ratio, ranking_pass)

    def forward_grad_policy(
        self,
        micro_batch_index: int,
        valid: Tensor,
        global_token_index: Tensor,
        reference: ReferenceScores | None,
        valid_on_host: HostMask | None = None,
    ) -> ForwardGradPolicy | None:
        if self.predicted is None:
            return super().forward_grad_policy(micro_batch_index, valid, global_token_index, reference, valid_on_host)
        lowest = lowest_selected_scores(global_token_index, self.config, self.predicted)[0]
        return build_forward_grad_policy(
            self.config, self.ratio, valid, reference, valid_on_host=valid_on_host, threshold=lowest
        )

    def select(self, micro_batch_index: int, tokens: TokenBatch) -> Selection:
        predicted = self.predicted
        selection = (
            self.ranked[micro_batch_index] if predicted is None else select_by_threshold(tokens, self.config, predicted)
        )
        self.tokens.append(concat_micro_batches([tokens]))
        self.masks.append(selection.selected)
        return selection

    def end_step(self) -> None:
        super().end_step()
        if self.tokens:
            tokens, selected = concat_micro_batches(self.tokens), torch.cat(self.masks)
            self.predictor.observe(tokens, selected, self.ratio, self.next_ratio)
        self.predictor.broadcast(self.config.pp_group)

    def selected_share(self) -> float:
        if self.predicted is None:
            return super().selected_share()
        policy = self.config.policy
        return policy.ratio or self.ratio if isinstance(policy, TopK) else self.predictor.share

    def state_dict(self) -> dict[str, Any]:
        return self.predictor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "values" in state:  # not the state of an adaptive ratio
            self.predictor.load_state_dict(state)
