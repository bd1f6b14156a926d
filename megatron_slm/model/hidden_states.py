"""Interface between the last pipeline stage and the objective: hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_slm.objective.linear_cross_entropy.api import linear_cross_entropy
from megatron_slm.objective.linear_cross_entropy.backward_rows import request_together
from megatron_slm.objective.linear_cross_entropy.forward_grad_policy import ForwardGradPolicy
from megatron_slm.objective.linear_cross_entropy.product import linear_in_fp32
from megatron_slm.objective.linear_cross_entropy.settings import LinearCrossEntropyConfig, TokenLosses
from megatron_slm.objective.vocab_shard import VocabShard, gather_sequence


class LMHead(ColumnParallelLinear):
    """Extend Megatron-Core's output layer: with labels, it computes token losses instead of logits.

    Token losses are computed by a module call, so that hooks which gather sharded parameters run.
    """

    settings: LinearCrossEntropyConfig

    @classmethod
    def convert(cls, layer: Any, settings: LinearCrossEntropyConfig) -> None:
        """Convert an output layer in place, since Megatron-Core constructs it and accepts no other class."""
        layer.__class__ = cls
        layer.settings = settings

    def forward(self, hidden: Tensor, weight: Tensor | None = None, *args: Any, **options: Any) -> Any:
        if "labels" not in options:
            return super().forward(hidden, weight, *args, **options)
        return linear_cross_entropy(hidden, self.weight if weight is None else weight, config=self.settings, **options)


@dataclass(frozen=True)
class HiddenStates:
    """Hold the final hidden states of a micro-batch for the main head and each MTP head."""

    heads: tuple[Tensor, ...]  # [s, b, h] each; with sequence parallelism [s / tp, b, h]
    lm_head: LMHead
    weight: Tensor | None  # the embedding's, if tied; None: the LM head's
    samples: int | None = None  # b, if all samples are packed into one row: heads [b * s, 1, h]; else None

    def token_losses(
        self, labels: Tensor, *, forward_grad: ForwardGradPolicy | None = None, with_entropy: bool = False
    ) -> TokenLosses:
        """Return the token losses of the main head; arguments and result as those of :meth:`head_losses`."""
        return self.head_losses([labels], forward_grad=forward_grad, with_entropy=with_entropy)[0]

    def head_losses(
        self, labels: Sequence[Tensor], *, forward_grad: ForwardGradPolicy | None = None, with_entropy: bool = False
    ) -> list[TokenLosses]:
        """Return the token losses of the main head and of MTP heads, and optionally entropies, each [b, s].

        Args:
            labels: [b, s] int64, of the main head, then of the MTP heads.
            forward_grad: tokens whose gradient of the main head's loss is computed in the forward pass.
            with_entropy: also return the entropies of the next-token distributions.
        """
        shape = labels[0].shape
        if self.samples is not None:
            labels = [each.reshape(1, -1) for each in labels]
            forward_grad = None if forward_grad is None else forward_grad.as_one_row()
        policies = [forward_grad, *[None] * (len(labels) - 1)]
        found: list[TokenLosses] = [
            self.lm_head(hidden, self.weight, labels=each.t(), forward_grad=policy, with_entropy=with_entropy)
            for hidden, each, policy in zip(self.heads, labels, policies, strict=False)
        ]
        losses: Sequence[Tensor] = [head.loss for head in found]
        rows = [head.rows for head in found if head.rows is not None]
        if len(rows) == len(found) > 1:
            losses = request_together(rows, losses)
        return [
            TokenLosses(loss.t().reshape(shape), None if head.entropy is None else head.entropy.t().reshape(shape))
            for loss, head in zip(losses, found, strict=True)
        ]

    def select(self, tokens: Tensor) -> Tensor:
        """Return the main head's hidden states of selected tokens, [n, h] in batch order.

        Args:
            tokens: [b, s] bool, True for selected tokens.
        """
        return self._main_head().transpose(0, 1)[tokens]

    def last_column(self) -> Tensor:
        """Return the main head's hidden states of the last token of each sequence, [b, h]."""
        return self._main_head()[-1]

    def _main_head(self) -> Tensor:
        """Return the main head's hidden states of all tokens, [s, b, h]."""
        return gather_sequence(self.heads[0], self.lm_head.settings.tp_group, self.lm_head.sequence_parallel)

    @torch.no_grad()
    def logits(self, selected: Tensor) -> Tensor:
        """Return this rank's vocabulary shard of the logits, [n, V / tp] fp32; padding entries are -inf.

        Args:
            selected: [n, h], the result of :meth:`select` or :meth:`last_column`, or some rows of it.
        """
        weight, settings = self.lm_head.weight if self.weight is None else self.weight, self.lm_head.settings
        logits = linear_in_fp32(selected, weight)
        if settings.softcap is not None:
            logits = settings.softcap * torch.tanh(logits / settings.softcap)
        shard = VocabShard.from_size(weight.size(0), settings.tp_group, settings.vocab_size)
        logits[:, shard.unpadded_size :] = -torch.inf
        return logits
