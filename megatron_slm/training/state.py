"""State of a training run, as saved in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm.mcore.optimizer import PreparedGradients, dynamic_scalers, prepare_gradients, update_weights
from megatron_slm.model.experts import AuxiliaryLosses
from megatron_slm.model.selected_tokens import BackwardFilter
from megatron_slm.objective.selection.strategies import SelectionStrategy
from megatron_slm.reference.history import ModelHistory
from megatron_slm.runtime.groups import Groups
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.data_order import DataRecord
from megatron_slm.training.label_bytes import LabelBytes
from megatron_slm.training.optimizer import gather_parameters
from megatron_slm.training.spikes import SpikeDetector


@dataclass
class TrainProgress:
    """Training progress: completed steps and consumed samples."""

    step: int = 0
    consumed_samples: int = 0


@dataclass
class TrainState:
    """Hold the model, optimizer, schedule, selection and progress of a run on this rank."""

    model_chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    groups: Groups
    tokenizer: Tokenizer
    selection: SelectionStrategy
    auxiliary: AuxiliaryLosses
    spikes: SpikeDetector
    backward_filter: BackwardFilter | None = None  # None for the exact backward pass
    history: ModelHistory | None = None  # with --reference-history
    data: DataRecord = field(default_factory=DataRecord)
    progress: TrainProgress = field(default_factory=TrainProgress)

    @cached_property
    def label_bytes(self) -> LabelBytes:
        """Return the counter of the bytes of labels."""
        return LabelBytes(self.tokenizer, self.groups.device)

    def layout(self) -> dict[str, int]:
        """Return the parallel sizes for the manifest."""
        groups = self.groups
        layout = {"tensor": groups.tp_size, "pipeline": groups.pp_size, "data": groups.dp_size}
        return {**layout, "context": groups.cp_size} if groups.cp_size > 1 else layout

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def dynamic_loss_scale(self) -> float | None:
        """Return the loss scale of the next step; None without dynamic loss scaling."""
        scalers = dynamic_scalers(self.optimizer)
        return float(scalers[0].scale) if scalers else None

    def prepare_gradients(self) -> PreparedGradients:
        """Pass the unscaled gradients to the optimizer. Collective over all ranks."""
        return prepare_gradients(self.optimizer)

    def optimizer_step(self, grad_norm: float) -> None:
        """Clip the gradients, whose norm is ``grad_norm``, and update the weights. Collective over all ranks."""
        update_weights(self.optimizer, grad_norm)

    def update_history(self) -> None:
        """Update the reference model of --reference-history after a step. Collective over the data-parallel ranks."""
        if self.history is not None and self.history.is_due(self.progress.step):
            gather_parameters(self.model_chunks)
            self.history.update(self.model_chunks)
