"""Evaluate the held-out loss of named validation sets on fixed samples, so that evaluations are comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from megatron_slm.config.schema import RunConfig
from megatron_slm.data.batches import BatchShape, BatchStream
from megatron_slm.objective.selection.config import SelectionConfig
from megatron_slm.objective.selection.strategies import ExactSelection
from megatron_slm.runtime.collective import all_reduce_sum
from megatron_slm.runtime.console import Advance, progress
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.training.metrics import TokenSums
from megatron_slm.training.state import TrainState
from megatron_slm.training.step import StepPasses, no_reference


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over all valid tokens of one set, in nats per token, and their text."""

    loss: float
    tokens: int
    bytes: int | None  # UTF-8 bytes of the text of these tokens; None if the tokenizer does not define them

    @property
    def bits_per_byte(self) -> float | None:
        """Return the loss in bits per byte of text; losses of end-of-document tokens are included."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def __str__(self) -> str:
        bits = self.bits_per_byte
        return f"{self.loss:.4f}" if bits is None else f"{self.loss:.4f} ({bits:.4f} bits/byte)"


def evaluate(
    state: TrainState,
    sets: dict[str, torch.utils.data.Dataset],
    config: RunConfig,
    shape: BatchShape,
    must_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Evaluation]:
    """Evaluate every set on its first samples, and return the results on every rank. Collective over all ranks.

    Args:
        must_stop: collective decision, called before each batch. If it returns True, the evaluation stops, and only
            complete sets are returned.
    """
    results = {}
    with evaluation_mode(state, config), torch.no_grad():
        for name, dataset in sets.items():
            batches = config.logging.eval_iters
            if config.data.full_validation:
                batches = -(-len(dataset) // shape.global_batch_size)  # type: ignore[arg-type]
            stream = BatchStream(
                dataset,
                shape,
                device=state.groups.device,
                steps=batches,
                read_ahead=config.data.num_workers,
                masks_missing=True,
            )
            shown = state.groups.is_logging_rank
            with closing(stream), progress(f"evaluating {name}", batches, "batches", enabled=shown) as bar:
                result = _evaluate_set(state, stream, bar, must_stop)
            if result is None:
                break
            results[name] = result
    return results


def _evaluate_set(
    state: TrainState, stream: BatchStream, bar: Advance, must_stop: Callable[[], bool]
) -> Evaluation | None:
    """Return the mean loss over the batches of the stream, or None if the evaluation was stopped."""
    groups = state.groups
    all_tokens = ExactSelection(SelectionConfig(None, dp_cp_group=groups.dp_cp, cp_group=groups.cp), groups.device)
    parts: list[TokenSums] = []
    size = torch.zeros((), dtype=torch.int64, device=groups.device)
    for micro_batches in stream:
        if must_stop():
            return None
        passes = StepPasses(state.model_chunks, micro_batches, no_reference(micro_batches))
        parts += [result.sums for result in passes.run(all_tokens)]
        for batch in micro_batches:
            size += state.label_bytes.count(batch)
        bar.advance()
    sums = TokenSums.reduce(parts, groups)
    if sums.diverged:
        raise DivergedError(f"evaluation: {sums.diverged} losses are NaN or infinite.")
    _, _, loss, tokens, *_ = sums.numbers
    all_reduce_sum(size, groups.dp_cp)
    return Evaluation(loss / max(tokens, 1), int(tokens), int(size) if state.label_bytes.is_known else None)


@contextmanager
def evaluation_mode(state: TrainState, config: RunConfig) -> Iterator[None]:
    """Disable dropout in the block, and overlapped parameter gathering, whose parameters are gathered first."""
    overlap = config.parallel.overlap_param_gather
    for chunk in state.model_chunks:
        if overlap:
            chunk.disable_forward_pre_hook()  # type: ignore[operator]
        chunk.eval()
    try:
        yield
    finally:
        for chunk in state.model_chunks:
            chunk.train()
            if overlap:
                chunk.enable_forward_pre_hook()  # type: ignore[operator]
