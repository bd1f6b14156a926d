"""The auxiliary losses of mixture-of-experts layers under Selective Language Modeling.

They balance the experts over all tokens that pass them, so selection must leave them alone. Megatron-Core multiplies
each by the tokens of a micro-batch, and divides all gradients at the end by the number of tokens that the loss counts,
which here are the selected ones: an auxiliary loss would grow to 1 / k of what it is under CLM. Its coefficient is
therefore scaled by the share of the valid tokens that is selected.

Megatron-Core before 0.19 also counts only the tokens of one rank where the ranks of tensor and context parallelism
share a micro-batch, so that with losses normalised per token the auxiliary losses are TP x CP times too small. The
coefficient makes up for that too; the tests hold every layout against one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_slm.mcore.experts import counts_tokens_of_all_ranks
from megatron_slm.model.gpt import model_config
from megatron_slm.runtime.groups import Groups


class AuxiliaryLosses:
    """The coefficients of the load-balancing loss and of the router's z-loss, of all chunks of a model."""

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: Groups) -> None:
        self.config = model_config(list(chunks))
        self.active = self.config.num_moe_experts is not None
        sharing = 1 if counts_tokens_of_all_ranks() else groups.tp_size * groups.cp_size
        self.balance = sharing * self.config.moe_aux_loss_coeff
        self.z = None if self.config.moe_z_loss_coeff is None else sharing * self.config.moe_z_loss_coeff

    def scale(self, selected_share: Callable[[], float]) -> None:
        """Scale the coefficients for a step; ``selected_share`` is called only if the model has experts."""
        if not self.active:
            return
        share = selected_share()
        self.config.moe_aux_loss_coeff = self.balance * share
        if self.z is not None:
            self.config.moe_z_loss_coeff = self.z * share
