"""Describe a step between its backward pass and its update: losses and documents of its samples, gradient norms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import Float16Module

from megatron_slm.data.batches import MicroBatch
from megatron_slm.data.sample_locations import document_spans
from megatron_slm.mcore.optimizer import gradients_of_norm, optimizer_parts
from megatron_slm.objective.tokens import TokenBatch, diverged_tokens
from megatron_slm.runtime.collective import gather_on_first_rank
from megatron_slm.runtime.groups import Groups
from megatron_slm.training.checkpoint import plain_chunks
from megatron_slm.training.state import TrainState
from megatron_slm.training.step import MicroBatchResult, StepResults

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(\w+)")
SHOWN_PARAMETERS = 5  # names of parameters with NaN per rank


@dataclass(frozen=True)
class DivergedToken:
    """Represent a token with a NaN or infinite loss."""

    position: int  # in the sample
    token_loss: float
    reference_loss: float | None


@dataclass(frozen=True)
class SampleLosses:
    """Represent a sample of a step; with context parallelism, sums over the slices of all ranks."""

    sample: int  # number in the run
    rank: int  # that computed its losses
    micro_batch: int
    row: int
    tokens: int  # valid ones
    selected: int
    loss_sum: float  # over valid tokens
    selected_loss_sum: float
    diverged: int
    first_diverged: DivergedToken | None

    @property
    def loss(self) -> float:
        """Return the mean loss over valid tokens in nats."""
        return self.loss_sum / max(self.tokens, 1)

    def __add__(self, other: SampleLosses) -> SampleLosses:
        """Return the sample over two slices of its tokens, of which each may be in several pieces."""
        first = min((self, other), key=lambda part: part.first_diverged.position if part.first_diverged else math.inf)
        return replace(
            self,
            rank=first.rank,
            tokens=self.tokens + other.tokens,
            selected=self.selected + other.selected,
            loss_sum=self.loss_sum + other.loss_sum,
            selected_loss_sum=self.selected_loss_sum + other.selected_loss_sum,
            diverged=self.diverged + other.diverged,
            first_diverged=first.first_diverged,
        )

    def record(self, dataset: Any) -> dict[str, Any]:
        """Return the sample as a JSON object, with the documents of its tokens."""
        return {
            "sample": self.sample,
            "rank": self.rank,
            "micro_batch": self.micro_batch,
            "row": self.row,
            "loss": plain_number(self.loss),
            "loss_selected": plain_number(self.selected_loss_sum / self.selected) if self.selected else None,
            "tokens": self.tokens,
            "selected": self.selected,
            "diverged": self.diverged,
            "documents": [asdict(span) for span in document_spans(dataset, self.sample)],
        }


def plain_number(value: float | None) -> float | str | None:
    """Return a number as JSON can hold it: NaN and infinities as strings."""
    return value if value is None or math.isfinite(value) else str(value)


def gather_samples(step: StepResults, groups: Groups) -> list[SampleLosses]:
    """Return all samples of the step on rank 0, highest losses first; nothing elsewhere. Collective over all ranks."""
    here = list(_local_samples(step, groups.rank)) if groups.tp_rank == 0 else []
    samples: dict[int, SampleLosses] = {}
    for part in gather_on_first_rank(here):
        for sample in part:
            samples[sample.sample] = samples[sample.sample] + sample if sample.sample in samples else sample
    return sorted(samples.values(), key=lambda sample: (-sample.diverged, -sample.loss, sample.sample))


def _local_samples(step: StepResults, rank: int) -> Iterator[SampleLosses]:
    for number, result in enumerate(step.results):
        batch = step.micro_batches[number]
        columns = _sample_columns(result)
        for row, index in enumerate(batch.sample_index.tolist()):
            tokens, selected, loss_sum, selected_loss_sum, diverged = columns[row]
            first = _first_diverged(result.tokens, row, batch) if diverged else None
            yield SampleLosses(
                *(index, rank, number, row, int(tokens), int(selected), loss_sum, selected_loss_sum, int(diverged)),
                first_diverged=first,
            )


def _sample_columns(result: MicroBatchResult) -> list[list[float]]:
    """Return valid and selected tokens, their summed losses, and diverged tokens of each row."""
    tokens, selected = result.tokens, result.selected
    loss = tokens.loss.double()
    columns = (
        tokens.valid.sum(1),
        selected.sum(1),
        loss.masked_fill(~tokens.valid, 0.0).sum(1),
        loss.masked_fill(~selected, 0.0).sum(1),
        diverged_tokens(tokens).sum(1),
    )
    return torch.stack([column.double() for column in columns], 1).tolist()


def _first_diverged(tokens: TokenBatch, row: int, batch: MicroBatch) -> DivergedToken:
    column = int(diverged_tokens(tokens)[row].nonzero()[0])
    position = int(tokens.global_token_index[row, column]) % batch.sample_length
    reference = None if tokens.reference is None else float(tokens.reference.loss[row, column])
    return DivergedToken(position, float(tokens.loss[row, column]), reference)


def diverged_parameters(state: TrainState) -> dict[int, list[str]]:
    """Return the first parameters with NaN or infinite gradients by rank, on rank 0. Collective over all ranks."""
    names: list[str] = []
    for name, parameter in _named_parameters(state):
        gradient = getattr(parameter, "main_grad", None)
        if len(names) < SHOWN_PARAMETERS and gradient is not None and not bool(gradient.isfinite().all()):
            names.append(name)
    return {rank: found for rank, found in enumerate(gather_on_first_rank(names)) if found}


def module_gradient_norms(state: TrainState) -> dict[str, float]:
    """Return the gradient norm of each module of the model, on rank 0. Collective over all ranks.

    The modules are the embedding, the parts of each layer, the final norm and the output layer. The squares of their
    norms sum to the square of the gradient norm.
    """
    names = {parameter: name for name, parameter in _named_parameters(state)}
    total: dict[str, float] = {}
    for part in optimizer_parts(state.optimizer):
        here: dict[str, float] = {}
        for parameter, gradient in gradients_of_norm(part, names):
            module = _module_of(names[parameter])
            here[module] = here.get(module, 0.0) + float(gradient.double().square().sum())
        counted = dist.get_process_group_ranks(part.get_grad_stats_parallel_group())
        for rank, squares in enumerate(gather_on_first_rank(here)):
            for module, square in squares.items() if rank in counted else ():
                total[module] = total.get(module, 0.0) + square
    return {module: math.sqrt(square) for module, square in sorted(total.items(), key=_module_order)}


def _named_parameters(state: TrainState) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield all parameters of this rank, with the layer numbers of the complete model."""
    for chunk in map(_model, plain_chunks(state.model_chunks)):
        for name, parameter in chunk.named_parameters():
            if (layer := LAYER.match(name)) is not None:
                number = int(chunk.get_submodule(name[: layer.end(1)]).layer_number) - 1  # type: ignore[arg-type]
                name = f"{name[: layer.start(1)]}{number}{name[layer.end(1) :]}"
            yield name, parameter


def _model(chunk: torch.nn.Module) -> torch.nn.Module:
    """Return the model of a chunk without its 16-bit wrapper."""
    return chunk.module if isinstance(chunk, Float16Module) else chunk


def _module_of(name: str) -> str:
    layer = LAYER.match(name)
    return layer.group() if layer is not None else name.rpartition(".")[0]


def _module_order(item: tuple[str, float]) -> tuple[int, int, str]:
    layer, name = LAYER.match(item[0]), item[0]
    if layer is not None:
        return 1, int(layer.group(1)), name
    return (0 if name.startswith("embedding") else 2), 0, name
