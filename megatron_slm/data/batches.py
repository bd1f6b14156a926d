"""Micro-batches of a data-parallel rank, in an order that is independent of the parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.data.read_ahead import read_ahead as read_in_advance
from megatron_slm.mcore.layers import context_positions
from megatron_slm.runtime.errors import ConfigError


@dataclass(frozen=True)
class MicroBatch:
    """Hold the inputs of one forward pass; with context parallelism, s is the length of this rank's slice."""

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64, the next tokens
    loss_mask: Tensor  # [b, s] bool, True for labels that contribute to the loss
    position_ids: Tensor  # [b, s] int64
    sample_index: Tensor  # [b] int64, index of each sample in the run
    first_sample: int  # index of the first sample of this micro-batch step over all data-parallel ranks
    documents: Tensor | None = None  # [b, length of a full sample] int32, tokens attend to their document only; or None
    reference_loss: Tensor | None = None  # [b, s] fp32 in nats, of the labels; None without sidecars
    reference_entropy: Tensor | None = None  # [b, s] fp32 in nats, of the distributions that predict the labels
    context_size: int = 1  # context-parallel size
    positions: Tensor | None = None  # [s] int64, positions of the columns in their sample; None: 0 ... s - 1
    loss_mask_on_host: NDArray[np.bool_] | None = None  # ``loss_mask`` before it was moved to a device
    corpus: Tensor | None = None  # [b] int64, position of each sample's corpus in the blend; None without a blend

    @property
    def sample_length(self) -> int:
        """Return the number of tokens of a full sample."""
        return self.tokens.size(1) * self.context_size

    @property
    def attention_mask(self) -> Tensor | None:
        """Return the lengths of the documents of each sample, [b, n] int64 on the host, padded by zeros, or None.

        With context parallelism, return a mask of other documents and later tokens, [b, 1, s, length of a full sample]
        bool. It has the square of the sample length as bytes: it is built when it is needed, on the device.
        """
        if self.documents is None:
            return None
        if self.context_size > 1:
            return document_mask(self.documents, self.positions)
        return self._document_lengths

    @cached_property
    def _document_lengths(self) -> Tensor:
        assert self.documents is not None
        return document_lengths(self.documents)

    def token_index(self) -> Tensor:
        """Return the index of each token in the run, [b, s] int64."""
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.sample_length, device=self.tokens.device)
        return self.sample_index[:, None] * self.sample_length + positions

    def cp_slice(self, size: int, rank: int) -> MicroBatch:
        """Return the slice of every sample for context-parallel rank ``rank`` of ``size``."""
        if size == 1:
            return self
        shape, positions = self.tokens.shape, context_positions(self.sample_length, size, rank)
        columns: dict[str, Any] = {
            field.name: value[:, positions]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.shape == shape
        }
        columns["documents"] = self.documents  # of the keys, which cover the full sample
        return replace(self, **columns, context_size=size, positions=positions)

    def to(self, device: torch.device) -> MicroBatch:
        """Move a micro-batch from the host to a device; copies of pinned memory do not block the host.

        Documents remain on the host, unless they become a mask.
        """
        moved = self._each(lambda values: values.to(device, non_blocking=True))
        return replace(moved, loss_mask_on_host=self.loss_mask.numpy())

    def pinned(self) -> MicroBatch:
        """Return a copy in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of the tensors, which were copied on another stream, until ``stream`` has used it."""

        def record(values: Tensor) -> Tensor:
            values.record_stream(stream)
            return values

        self._each(record)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
            and (field.name != "documents" or self.context_size > 1)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class BatchShape:
    """Represent the division of a global batch into micro-batches, in Megatron-LM's order.

    Micro-batch step j consists of the samples [j · b · dp, (j + 1) · b · dp) of the global batch, of which
    data-parallel rank r processes the slice [r · b, (r + 1) · b). Context-parallel ranks share samples.
    """

    micro_batch_size: int
    num_micro_batches: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_micro_batches * self.dp_size

    def of_size(self, samples: int) -> BatchShape:
        """Return the division of a global batch of another size."""
        return replace(self, num_micro_batches=samples // (self.micro_batch_size * self.dp_size))


class BatchStream(Iterator[list[MicroBatch]]):
    """Iterate over the optimizer steps of a run, yielding the micro-batches of one data-parallel rank.

    Args:
        dataset: dataset with the sample format of Megatron-Core's GPT dataset.
        shape: division of the global batch.
        sizes: global batch sizes by consumed samples; None: always that of ``shape``.
        start_sample: number of consumed samples, from which a resumed run continues.
        steps: number of steps; None for any number.
        read_ahead: steps that a background thread reads and copies in advance; 0 reads on demand.
        device: device of the returned tensors.
        masks_missing: pad with samples of empty loss mask beyond the end of the dataset (for evaluation).

    Raises:
        ConfigError: the dataset has fewer samples than requested.
    """

    def __init__(
        self,
        dataset: Dataset,
        shape: BatchShape,
        *,
        device: torch.device,
        sizes: BatchSizes | None = None,
        start_sample: int = 0,
        steps: int | None = None,
        read_ahead: int = 0,
        masks_missing: bool = False,
    ) -> None:
        self.dataset, self.shape, self.sizes, self.masks_missing = dataset, shape, sizes, masks_missing
        self.size: int = len(dataset)  # type: ignore[arg-type]
        jobs = (partial(self._step, *step) for step in islice(self._steps(start_sample), steps))
        self._batches = read_in_advance(jobs, device, read_ahead)

    def __next__(self) -> list[MicroBatch]:
        return next(self._batches)

    def close(self) -> None:
        """Stop the background thread."""
        self._batches.close()

    def _steps(self, first: int) -> Iterator[tuple[int, BatchShape]]:
        """Yield the first sample and the shape of each step."""
        while True:
            shape = self.shape if self.sizes is None else self.shape.of_size(self.sizes.at(first))
            yield first, shape
            first += shape.global_batch_size

    def _step(self, first: int, shape: BatchShape) -> list[MicroBatch]:
        if first + shape.global_batch_size > self.size and not self.masks_missing:
            raise ConfigError(f"the dataset has {self.size} samples, but the batch at sample {first} exceeds it.")
        stride = shape.micro_batch_size * shape.dp_size
        starts = range(first, first + shape.global_batch_size, stride)
        return [self._micro_batch(start).cp_slice(shape.cp_size, shape.cp_rank) for start in starts]

    def _micro_batch(self, first: int) -> MicroBatch:
        size = self.shape.micro_batch_size
        start = first + self.shape.dp_rank * size
        samples = [self._sample(index) for index in range(start, start + size)]
        names = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
        columns = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        return MicroBatch(
            tokens=columns["tokens"],
            labels=columns["labels"],
            loss_mask=columns["loss_mask"] > 0,
            position_ids=columns["position_ids"],
            sample_index=torch.arange(start, start + size),
            first_sample=first,
            documents=columns.get("documents"),
            reference_loss=columns.get("reference_loss"),
            reference_entropy=columns.get("reference_entropy"),
            corpus=_corpora(samples),
        )

    def _sample(self, index: int) -> dict[str, Tensor]:
        if index < self.size:
            return self.dataset[index]
        filler = self.dataset[0]
        return {**filler, "loss_mask": torch.zeros_like(filler["loss_mask"])}


def _corpora(samples: Sequence[dict[str, Any]]) -> Tensor | None:
    """Return the positions in the blend that Megatron-Core's blended dataset adds to its samples, [b] int64."""
    if "dataset_id" not in samples[0]:
        return None
    return torch.tensor([int(sample["dataset_id"]) for sample in samples])


def document_lengths(numbers: Tensor) -> Tensor:
    """Return the lengths of runs of one document number in each sample [b, s]: [b, n] int64, padded by zeros."""
    runs = []
    for row in numbers.numpy():
        starts = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
        runs.append(np.diff(starts, append=len(row)))
    lengths = np.zeros((len(runs), max(map(len, runs))), np.int64)
    for sample, found in enumerate(runs):
        lengths[sample, : len(found)] = found
    return torch.from_numpy(lengths)


def document_mask(numbers: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the attention mask [b, 1, queries, s] bool for the document number of each token, [b, s].

    True masks later tokens and those of other documents.

    Args:
        positions: positions of the queries, [queries] int64; None: all.
    """
    columns = torch.arange(numbers.size(1), device=numbers.device)
    queries = columns if positions is None else positions
    return ((columns > queries[:, None]) | (numbers[:, queries, None] != numbers[:, None, :]))[:, None]
