"""Tokens whose gradient may be computed in the forward pass, and the speculative threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy, HostMask
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.policy import ranks_by_token_loss
from megatron_slm.objective.tokens import ReferenceScores


def build_forward_grad_policy(
    config: SelectionConfig,
    ratio: float,
    valid: Tensor,
    reference: ReferenceScores | None,
    *,
    valid_on_host: HostMask | None = None,
    selected: Tensor | None = None,
    selected_on_host: HostMask | None = None,
    threshold: Tensor | None = None,
) -> ForwardGradPolicy | None:
    """Return the rule for a micro-batch, or None if nothing is known about its selection.

    Every valid token if all of them are selected (CLM, k = 1); the selected ones if they are known; else those whose
    score reaches a threshold, if the policy is one score that depends only on the token loss. There is no rule with a
    mix, with which every token has a gradient, and with different weights, which are known after the selection.

    Args:
        config: settings of the selection.
        ratio: the selection ratio.
        valid: [b, s] bool, the loss mask.
        reference: reference scores of the micro-batch.
        valid_on_host: ``valid`` on the host, if it is there.
        selected: [b, s] bool, if the selection is known before the losses.
        selected_on_host: ``selected`` on the host, if it is there.
        threshold: scalar or [b, s] fp32, the lowest score that is selected.
    """
    policy = config.policy
    if config.mix or config.weight_temperature is not None:
        return None
    if policy is None or config.selects_everything(ratio):
        return ForwardGradPolicy(valid, valid_on_host=valid_on_host)
    if selected is not None:
        return ForwardGradPolicy(selected, valid_on_host=selected_on_host)
    if threshold is None or not ranks_by_token_loss(policy):
        return None
    share = policy.ratio or ratio
    if policy.score == "token-loss":
        return ForwardGradPolicy(valid, threshold, share=share)
    return None if reference is None else ForwardGradPolicy(valid, threshold, reference.loss, share)


class SpeculativeThreshold:
    """Estimate the threshold of the next micro-batch from earlier ones.

    The band is the mean step from one threshold to the next. A token in the band that turns out selected costs
    2HV more FLOPs than one with its gradient in the forward pass, a token whose gradient was computed in vain 10HV;
    with thresholds that scatter like a normal distribution, a band of about one standard deviation balances the two.
    """

    DECAY = 0.9  # of the running mean of the steps

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.step: Tensor | None = None

    def observe(self, threshold: Tensor) -> None:
        """Add the exact threshold of a micro-batch, a scalar; it remains on its device, so that nothing waits.

        An infinite or NaN threshold, such as that of a micro-batch without valid tokens, is left out.
        """
        threshold = threshold.detach().clone()
        if self.last is not None:
            step = (threshold - self.last).abs()
            mean = step if self.step is None else self.DECAY * self.step + (1 - self.DECAY) * step
            self.step = step if self.step is None else _known(mean, _known(step, self.step))
            threshold = _known(threshold, self.last)
        self.last = threshold

    def estimate(self) -> Tensor | None:
        """Return the score from which a token is very likely selected; None before the second threshold."""
        if self.last is None or self.step is None:
            return None
        return self.last + self.step

    def state_dict(self) -> dict[str, float | None]:
        return {name: None if value is None else float(value) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, float | None], device: torch.device) -> None:
        for name in vars(self):
            value = state[name]
            setattr(self, name, None if value is None else torch.tensor(value, device=device))


def _known(value: Tensor, otherwise: Tensor) -> Tensor:
    """Return the value if it is finite, otherwise another one."""
    return torch.where(value.isfinite(), value, otherwise)
