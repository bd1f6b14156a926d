"""Held-out loss of named validation sets: always the same samples, so that evaluations can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_slm.config.schema import Config
from megatron_slm.data.batches import BatchShape, BatchStream
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.strategies import ExactSelection
from megatron_slm.runtime.console import Advance, progress
from megatron_slm.training.metrics import TokenSums
from megatron_slm.training.state import TrainState
from megatron_slm.training.step import NoReference, StepPasses


@dataclass(frozen=True)
class Evaluation:
    """Mean loss of all valid tokens of one set, nats."""

    loss: float
    tokens: int


def evaluate(
    state: TrainState,
    sets: dict[str, torch.utils.data.Dataset],
    config: Config,
    shape: BatchShape,
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Evaluation]:
    """Evaluate every set on its first samples. Collective over all ranks; the result is known on every rank.

    Args:
        must_stop: asked before each batch on every rank. If it answers True, on all of them, the evaluation ends, and
            only the sets that are complete are returned.
    """
    results = {}
    with evaluation_mode(state, config), torch.no_grad():
        for name, dataset in sets.items():
            batches = config.logging.eval_iters
            if config.data.full_validation:
                batches = -(-len(dataset) // shape.global_batch_size)  # type: ignore[arg-type]
            stream = BatchStream(dataset, shape, device=state.groups.device, masks_missing=True)
            shown = state.groups.is_logging_rank
            with progress(f"evaluating {name}", batches, "batches", enabled=shown) as bar:
                result = _evaluate_set(state, stream, batches, bar, must_stop)
            if result is None:
                break
            results[name] = result
    return results


def _evaluate_set(
    state: TrainState, stream: BatchStream, batches: int, bar: Advance, must_stop: Callable[[], bool]
) -> Evaluation | None:
    """Return the mean loss over ``batches`` batches; None if the evaluation was stopped."""
    groups = state.groups
    everything = ExactSelection(SelectionConfig(None, group=groups.dp_cp, context=groups.cp), groups.device)
    parts: list[TokenSums] = []
    for _ in range(batches):
        if must_stop():
            return None
        micro_batches = next(stream)
        passes = StepPasses(state.chunks, micro_batches, NoReference().score(micro_batches))
        parts += passes.run(everything)
        bar.advance()
    _, _, loss, tokens, _, _ = TokenSums.reduce(parts, groups).values.tolist()
    return Evaluation(loss / max(tokens, 1), int(tokens))


@contextmanager
def evaluation_mode(state: TrainState, config: Config) -> Iterator[None]:
    """Turn dropout off for the block; parameters whose gathering overlaps the forward pass are gathered first."""
    overlap = config.parallel.overlap_param_gather
    for chunk in state.chunks:
        if overlap:
            chunk.disable_forward_pre_hook()  # type: ignore[operator]
        chunk.eval()
    try:
        yield
    finally:
        for chunk in state.chunks:
            chunk.train()
            if overlap:
                chunk.enable_forward_pre_hook()  # type: ignore[operator]
