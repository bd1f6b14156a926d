"""Micro-batches of one data-parallel rank, in an order that depends on the run alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_slm.mcore.layers import context_positions
from megatron_slm.runtime.errors import ConfigError


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank reads. Under context parallelism s is this rank's part of each sample."""

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64, the next tokens
    loss_mask: Tensor  # [b, s] bool, True where the label counts
    position_ids: Tensor  # [b, s] int64
    sample_index: Tensor  # [b] int64, place of the sample in the run
    first_sample: int  # place of the first sample of this micro-batch step over all data-parallel ranks
    attention_mask: Tensor | None = None  # [b, 1, s, s] bool, True where attention is forbidden; None: causal
    reference_loss: Tensor | None = None  # [b, s] fp32 of the labels, nats, where the dataset has sidecars
    reference_entropy: Tensor | None = None  # [b, s] fp32 of the distributions that predict the labels, nats
    context_size: int = 1  # ranks that hold a part of each sample
    positions: Tensor | None = None  # [s] int64, places of the columns in their sample; None: the whole in order

    @property
    def sample_length(self) -> int:
        """Tokens of a whole sample."""
        return self.tokens.size(1) * self.context_size

    def token_index(self) -> Tensor:
        """Place of each token in the run, [b, s] int64."""
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.sample_length, device=self.tokens.device)
        return self.sample_index[:, None] * self.sample_length + positions

    def part(self, size: int, rank: int) -> MicroBatch:
        """What context-parallel rank ``rank`` of ``size`` holds of every sample."""
        if size == 1:
            return self
        shape, positions = self.tokens.shape, context_positions(self.sample_length, size, rank)
        columns: dict[str, Any] = {
            field.name: value[:, positions]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.shape == shape
        }
        if self.attention_mask is not None:
            columns["attention_mask"] = self.attention_mask[:, :, positions]
        return replace(self, **columns, context_size=size, positions=positions)

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut: micro-batch step j takes the samples [j · b · dp, (j + 1) · b · dp) of it, and
    data-parallel rank r the slice [r · b, (r + 1) · b) of those (Megatron-LM's order). Context-parallel ranks share
    samples."""

    micro_batch_size: int
    num_micro_batches: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self.dp_size


class BatchStream(Iterator[list[MicroBatch]]):
    """Each ``next`` is one optimizer step's micro-batches for one data-parallel rank.

    Args:
        dataset: samples as Megatron-Core's GPT dataset gives them.
        shape: how a global batch is cut.
        start_sample: samples that the run has consumed; a resumed run goes on exactly where it was.
        read_ahead: steps that a background thread prepares; 0 reads when asked.
        device: where the tensors go.
        masks_missing: samples beyond the dataset's end are given with an empty loss mask (evaluation).

    Raises:
        ConfigError: the dataset has fewer samples than are asked for.
    """

    def __init__(
        self,
        dataset: Dataset,
        shape: BatchShape,
        *,
        device: torch.device,
        start_sample: int = 0,
        read_ahead: int = 0,
        masks_missing: bool = False,
    ) -> None:
        self.dataset, self.shape, self.device = dataset, shape, device
        self.size: int = len(dataset)  # type: ignore[arg-type]
        self.read_ahead, self.masks_missing = read_ahead, masks_missing
        self.next_sample = start_sample
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if read_ahead else None
        self.ahead: deque[Future[list[MicroBatch]]] = deque()

    def __next__(self) -> list[MicroBatch]:
        if self.pool is None:
            return self._on_device(self._step(self._advance()))
        while len(self.ahead) <= self.read_ahead:
            if self.ahead and self.next_sample + self.shape.global_batch_size > self.size:
                break  # nothing left to read ahead
            self.ahead.append(self.pool.submit(self._step, self._advance()))
        return self._on_device(self.ahead.popleft().result())

    def close(self) -> None:
        """End the background thread."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _advance(self) -> int:
        first = self.next_sample
        self.next_sample += self.shape.global_batch_size
        return first

    def _step(self, first: int) -> list[MicroBatch]:
        if first + self.shape.global_batch_size > self.size and not self.masks_missing:
            raise ConfigError(
                f"the dataset has {self.size} samples, and the batch that begins at {first} is not there."
            )
        stride = self.shape.micro_batch_size * self.shape.dp_size
        return [self._micro_batch(first + step * stride) for step in range(self.shape.num_micro_batches)]

    def _micro_batch(self, first: int) -> MicroBatch:
        size = self.shape.micro_batch_size
        start = first + self.shape.dp_rank * size
        samples = [self._sample(index) for index in range(start, start + size)]
        names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]  # a blend adds a number
        columns = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        return MicroBatch(
            tokens=columns["tokens"],
            labels=columns["labels"],
            loss_mask=columns["loss_mask"] > 0,
            position_ids=columns["position_ids"],
            sample_index=torch.arange(start, start + size),
            first_sample=first,
            attention_mask=columns.get("attention_mask"),
            reference_loss=columns.get("reference_loss"),
            reference_entropy=columns.get("reference_entropy"),
        )

    def _sample(self, index: int) -> dict[str, Tensor]:
        if index < self.size:
            return self.dataset[index]
        filler = self.dataset[0]
        return {**filler, "loss_mask": torch.zeros_like(filler["loss_mask"])}

    def _on_device(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        shape = self.shape
        return [batch.part(shape.cp_size, shape.cp_rank).to(self.device) for batch in micro_batches]
