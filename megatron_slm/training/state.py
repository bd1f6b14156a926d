"""State of a training run, as saved in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_slm.model.experts import AuxiliaryLosses
from megatron_slm.objective.selection.strategies import SelectionStrategy
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.runtime.groups import Groups
from megatron_slm.tokenizers.tokenizer import Tokenizer
from megatron_slm.training.data_order import DataRecord


@dataclass
class TrainProgress:
    """Training progress: completed steps and consumed samples."""

    step: int = 0
    consumed_samples: int = 0


@dataclass
class TrainState:
    """Hold the model, optimizer, schedule, selection and progress of a run on this rank."""

    chunks: Sequence[torch.nn.Module]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    groups: Groups
    tokenizer: Tokenizer
    selection: SelectionStrategy
    auxiliary: AuxiliaryLosses
    data: DataRecord = field(default_factory=DataRecord)
    progress: TrainProgress = field(default_factory=TrainProgress)

    def layout(self) -> dict[str, int]:
        """Return the parallel sizes for the manifest."""
        groups = self.groups
        layout = {"tensor": groups.tp_size, "pipeline": groups.pp_size, "data": groups.dp_size}
        return {**layout, "context": groups.cp_size} if groups.cp_size > 1 else layout

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

    def optimizer_step(self, samples: int) -> tuple[float, float]:
        """Update the weights and advance the schedule by ``samples``; return the learning rate and gradient norm.

        Raises:
            DivergedError: the gradient norm is NaN or infinite.
        """
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        _, grad_norm, _ = self.optimizer.step()
        norm = float(grad_norm) if grad_norm is not None else math.nan
        if grad_norm is not None and not math.isfinite(norm):
            raise DivergedError(f"the gradient norm is {norm}. A lower --lr or a longer warm-up may help.")
        self.scheduler.step(increment=samples)
        return lr, norm
