"""Settings of a selection."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from megatron_slm.objective.selection.policy import Policy, has_own_ratios, needs_token_entropy, selects_everything


@dataclass(frozen=True)
class SelectionConfig:
    """Settings of a selection; ``policy`` None selects every valid token (CLM)."""

    policy: Policy | None
    scope: str = "data-parallel"  # or "sequence", "micro-batch", "global-batch"
    dp_cp_group: ProcessGroup | None = None  # data- and context-parallel ranks, which share a micro-batch step
    cp_group: ProcessGroup | None = None  # context-parallel ranks, which share a micro-batch and its sequences
    pp_group: ProcessGroup | None = None  # pipeline-parallel ranks, of which the last has the losses
    mix: float = 0.0  # share of the weight that is spread evenly over all valid tokens
    seed: int = 1234  # of random and stochastic scores
    temperature: float = 1.0  # of stochastic scores
    weight_temperature: float | None = None  # of softmax weights over the selected tokens; None: equal weights
    corpus_ratios: tuple[float | None, ...] = ()  # of each corpus of the blend, ranked separately; None: the run's
    mtp_loss_weight: float = 0.0  # of all MTP heads together
    mtp_is_independent: bool = False  # MTP heads rank by their losses instead of following the main head

    @property
    def with_entropy(self) -> bool:
        """Return whether the entropies of the training model are needed."""
        return self.policy is not None and needs_token_entropy(self.policy)

    @property
    def uses_ratio(self) -> bool:
        """Return whether the run's ratio selects tokens, and not one of each term or corpus."""
        has_term = self.policy is not None and not has_own_ratios(self.policy)
        return has_term and (not self.corpus_ratios or None in self.corpus_ratios)

    def selects_everything(self, ratio: float) -> bool:
        """Return whether every valid token is selected with the run's ratio, whatever its scores."""
        return self.policy is None or all(
            selects_everything(self.policy, corpus_ratio or ratio) for corpus_ratio in self.corpus_ratios or (None,)
        )
