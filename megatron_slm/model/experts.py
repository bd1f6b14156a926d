"""Auxiliary losses of mixture-of-experts layers under Selective Language Modeling.

These losses balance the experts over all routed tokens, so selection must not change them. Megatron-Core multiplies
each one by the token count of the micro-batch, and divides the final gradients by the number of tokens in the loss.
Under SLM only selected tokens are counted, which would amplify the auxiliary losses by 1 / k compared with CLM. Their
coefficients are therefore multiplied by the selected share of the valid tokens.

If tensor- and context-parallel ranks share a micro-batch, Megatron-Core before 0.19 counts the tokens of one rank only,
so that per-token normalization makes the auxiliary losses too small by a factor of TP x CP. The coefficients correct
for this as well. The tests compare every layout with a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_slm.mcore.experts import counts_tokens_of_all_ranks
from megatron_slm.model.gpt import model_config
from megatron_slm.runtime.groups import Groups


class AuxiliaryLosses:
    """Scale the coefficients of the load-balancing loss and the router z-loss for all chunks of a model."""

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: Groups) -> None:
        self.config = model_config(list(chunks))
        self.active = self.config.num_moe_experts is not None
        sharing = 1 if counts_tokens_of_all_ranks() else groups.tp_size * groups.cp_size
        self.balance = sharing * self.config.moe_aux_loss_coeff
        self.z = None if self.config.moe_z_loss_coeff is None else sharing * self.config.moe_z_loss_coeff

    def scale(self, selected_share: Callable[[], float]) -> None:
        """Set the coefficients for one step; ``selected_share`` is called only if the model has experts."""
        if not self.active:
            return
        share = selected_share()
        self.config.moe_aux_loss_coeff = self.balance * share
        if self.z is not None:
            self.config.moe_z_loss_coeff = self.z * share
