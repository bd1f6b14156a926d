"""Held-out loss of named validation sets: always the same samples, so that evaluations can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_slm.config.schema import Config
from megatron_slm.data.batches import BatchShape, BatchStream
from megatron_slm.objective.selective_loss import Selector
from megatron_slm.runtime.console import Advance, progress
from megatron_slm.training.checkpoint import Trainable
from megatron_slm.training.metrics import TokenSums
from megatron_slm.training.step import StepSelection, token_sums


@dataclass(frozen=True)
class Evaluation:
    """Mean loss of all valid tokens of one set, nats."""

    loss: float
    tokens: int


def evaluate(
    trainable: Trainable,
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
    with evaluation_mode(trainable, config), torch.no_grad():
        for name, dataset in sets.items():
            batches = config.logging.eval_iters
            if config.data.full_validation:
                batches = -(-len(dataset) // shape.global_batch_size)  # type: ignore[arg-type]
            stream = BatchStream(dataset, shape, device=trainable.groups.device, masks_missing=True)
            shown = trainable.groups.is_logging_rank
            with progress(f"evaluating {name}", batches, "batches", enabled=shown) as bar:
                result = _evaluate_set(trainable, stream, batches, bar, must_stop)
            if result is None:
                break
            results[name] = result
    return results


def _evaluate_set(
    trainable: Trainable, stream: BatchStream, batches: int, bar: Advance, must_stop: Callable[[], bool]
) -> Evaluation | None:
    """Return the mean loss over ``batches`` batches; None if the evaluation was stopped."""
    everything = StepSelection(Selector(policy=None, group=trainable.groups.dp_cp, context=trainable.groups.cp))
    parts: list[TokenSums] = []
    for _ in range(batches):
        if must_stop():
            return None
        parts += token_sums(trainable.chunks, next(stream), everything, forward_only=True)
        bar.advance()
    _, _, loss, tokens, _, _ = TokenSums.reduce(parts, trainable.groups).values.tolist()
    return Evaluation(loss / max(tokens, 1), int(tokens))


@contextmanager
def evaluation_mode(trainable: Trainable, config: Config) -> Iterator[None]:
    """Turn dropout off for the block; parameters whose gathering overlaps the forward pass are gathered first."""
    overlap = config.parallel.overlap_param_gather
    for chunk in trainable.chunks:
        if overlap:
            chunk.disable_forward_pre_hook()  # type: ignore[operator]
        chunk.eval()
    try:
        yield
    finally:
        for chunk in trainable.chunks:
            chunk.train()
            if overlap:
                chunk.enable_forward_pre_hook()  # type: ignore[operator]
