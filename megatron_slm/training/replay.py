"""Repeat one step of a run exactly, and report its samples and gradients (--replay-step)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron_slm.config.schema import RunConfig
from megatron_slm.model.gpt import model_config
from megatron_slm.runtime.collective import gather_on_first_rank, on_first_rank
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.health.progress import progress as health
from megatron_slm.runtime.signals import StopSignals
from megatron_slm.training.events import StepMonitor
from megatron_slm.training.loop import Run, one_step, training_stream
from megatron_slm.training.metrics import step_losses
from megatron_slm.training.replay_report import Report, check_report_file, sample_report, write_report
from megatron_slm.training.replay_start import REPLAY_FLAG
from megatron_slm.training.spikes import GRADIENT, LOSS
from megatron_slm.training.state import TrainState
from megatron_slm.training.step import Step, StepResults
from megatron_slm.training.step_report import (
    SampleLosses,
    diverged_parameters,
    gather_samples,
    module_gradient_norms,
    plain_number,
)
from megatron_slm.training.stopping import StopDecision


@dataclass
class _Observer:
    """Collect the results of the replayed step, and refuse its update."""

    state: TrainState
    losses: dict[str, Any] = field(default_factory=dict)
    samples: list[SampleLosses] = field(default_factory=list)
    module_norms: dict[str, float] = field(default_factory=dict)
    parameters: dict[int, list[str]] = field(default_factory=dict)
    spikes: list[dict[str, Any]] = field(default_factory=list)

    def accept(self, step: StepResults, grad_norm: float) -> bool:
        self.losses = step_losses(step.sums)
        self.samples = gather_samples(step, self.state.groups)
        self.module_norms = module_gradient_norms(self.state)
        self.parameters = diverged_parameters(self.state)
        if not step.sums.diverged and math.isfinite(grad_norm):
            spikes = self.state.spikes.observe({LOSS: self.losses["loss"], GRADIENT: grad_norm})
            self.spikes = [asdict(spike) for spike in spikes]
        return False

    def report(self, run: Run, step: Step, rank_norms: list[float | None]) -> Report:
        """Return the report of the step as a JSON object."""
        losses = {
            name: plain_number(value) if isinstance(value, float) else value for name, value in self.losses.items()
        }
        return {
            "kind": "replay",
            "step": run.progress.step,
            "layout": self.state.layout(),
            **losses,
            "grad_norm": None if step.overflow else plain_number(step.grad_norm),
            "lr": step.lr,
            "spikes": self.spikes,
            "module_grad_norms": {module: plain_number(norm) for module, norm in self.module_norms.items()},
            "rank_grad_norms": [plain_number(norm) for norm in rank_norms],
            "nonfinite_parameters": {str(rank): names for rank, names in self.parameters.items()},
            "samples": [sample_report(run, sample) for sample in self.samples],
        }


def replay(run: Run, original: RunConfig, signals: StopSignals | None = None) -> None:
    """Train without outputs to the step before --replay-step, run that step and report it. Collective over all ranks.

    Args:
        run: run from :func:`megatron_slm.training.replay_start.replay_config`.
        original: configuration of the run to repeat, whose metrics are compared.
        signals: stop signals.

    Raises:
        ConfigError: the step is beyond the end of the run, or before its start; --replay-report names another file.
    """
    target, iterations = run.config.training.replay_step, run.config.training.train_iters
    assert target is not None
    if target > iterations:
        raise ConfigError(
            f"{REPLAY_FLAG} {target} is beyond the end of the run, step {iterations}. Choose a smaller one."
        )
    start = run.progress.step
    if start >= target:
        raise ConfigError(
            f"{REPLAY_FLAG} {target} needs a checkpoint of step {target - 1} or earlier, and --load is at step {start}."
        )
    on_first_rank(lambda: check_report_file(run.config))
    stop = StopDecision(run.state.groups, signals, run.config.training.exit_duration_in_mins)
    monitor = StepMonitor(run.state, run.config, run.datasets.train, records=False)
    stream, missing = training_stream(run), target - 1 - start
    try:
        with progress(f"training to step {target - 1}", missing, "steps", enabled=run.state.groups.rank == 0) as bar:
            for _ in range(missing):
                if stop.agreed():
                    run.console.print(f"stopping before the replayed step: {stop.reason}")
                    return
                one_step(run, stream, monitor.accept)
                bar.advance()
        observer = _Observer(run.state)
        with _rank_gradient_norms(run) as rank_norms:
            step = one_step(run, stream, observer.accept)
            assert step is not None, "the step is not skipped, see config.relations"
    finally:
        stream.close()
        health.enter("reporting", slow=True)
    norms = gather_on_first_rank(rank_norms[0] if rank_norms else None)
    on_first_rank(lambda: write_report(run, observer.report(run, step, norms), original))


@contextmanager
def _rank_gradient_norms(run: Run) -> Iterator[list[float]]:
    """Yield a list that receives the norm of this rank's gradient before its reduction and normalization.

    With --overlap-grad-reduce, gradients are reduced during the backward pass, and the list remains empty.
    """
    schedule, norms = model_config(list(run.state.model_chunks)), list[float]()
    finalize = schedule.finalize_model_grads_func

    def measured(*args: Any, **kwargs: Any) -> Any:
        parameters = (parameter for chunk in run.state.model_chunks for parameter in chunk.parameters())
        squares = [p.main_grad.double().square().sum() for p in parameters if hasattr(p, "main_grad")]
        scale = float(run.state.optimizer.get_loss_scale())
        norms.append(float(torch.stack(squares).sum().sqrt()) / scale if squares else 0.0)
        return finalize(*args, **kwargs)

    if not run.config.parallel.overlap_grad_reduce:
        schedule.finalize_model_grads_func = measured
    try:
        yield norms
    finally:
        schedule.finalize_model_grads_func = finalize
