"""Selected tokens of the micro-batches of a step, from the last pipeline stage to the layers of all stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_slm.runtime.groups import Groups, pipeline_group
from megatron_slm.runtime.host_reads import HostRead, HostReads, row_indices


@dataclass
class SelectedTokens:
    """Hold the selected tokens of one micro-batch."""

    mask: Tensor | None = None  # [s, b] bool, or [b * s, 1] of packed samples; None until they are known
    count: HostRead | int | None = None  # of selected tokens; known as soon as the mask is

    def known_mask(self) -> Tensor:
        """Return the selected tokens in a backward pass, [s, b] bool, or [b * s, 1] of packed samples."""
        assert self.mask is not None, "a backward pass started before the selection of its micro-batch"
        return self.mask

    @cached_property
    def rows(self) -> Tensor | None:
        """Return the selected rows of the flattened mask, [n] int64, or None if all are selected."""
        mask = self.known_mask()
        assert self.count is not None
        count = int(self.count)
        return None if count == mask.numel() else row_indices(mask.reshape(-1), count)


class BackwardFilter:
    """Provide the layers of a model with the selected tokens of the micro-batch whose pass runs.

    The last pipeline stage knows a selection after its losses and sends it to the other stages, which receive it before
    the backward pass of that micro-batch. A selection is small and its number of rows is needed on the host, so that it
    takes a gloo group of its own, which cannot disturb the order of the schedule's messages. The last stage sends it
    when the LM head has read its rows, so that the host waits for the device only once.
    """

    def __init__(self, groups: Groups) -> None:
        """Create the groups of all pipelines. Collective over all ranks."""
        self.current = SelectedTokens()
        self.host_reads = HostReads()  # shared with the LM head
        self._groups = groups
        self._rows = 1
        self._micro_batches: list[SelectedTokens] = []
        self._unsent: dict[int, HostRead] = {}  # selections [b, s] by micro-batch
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._pipeline = pipeline_group(groups, "gloo") if groups.pp_size > 1 else None

    def begin_step(self, micro_batches: int, rows: int) -> None:
        """Start the passes of a step.

        Args:
            micro_batches: number of micro-batches.
            rows: rows of a micro-batch in the layers: its samples, or 1 if they are packed.
        """
        self._rows = rows
        self._micro_batches = [SelectedTokens() for _ in range(micro_batches)]

    def end_step(self) -> None:
        """Wait until all selections have been received."""
        for work, _ in self._sent:
            work.wait()
        self._sent, self._micro_batches = [], []

    def enter_forward(self, index: int) -> None:
        """Start the forward pass of a micro-batch in one model chunk."""
        self.current = self._micro_batches[index]

    def enter_backward(self, index: int, output: Tensor, shape: Sequence[int]) -> None:
        """Enter the micro-batch again when the backward pass of its ``output`` starts, for recomputed layers.

        Args:
            index: micro-batch.
            output: output of a model chunk.
            shape: shape of the micro-batch's tokens, [b, s].
        """

        def enter(_: Tensor) -> None:
            self.current = self._micro_batches[index]
            if not self._groups.is_last_stage:
                self._receive(self.current, shape)
            elif index in self._unsent:
                self._send(self._unsent.pop(index), shape)

        if output.requires_grad:
            output.register_hook(enter)

    def select(self, index: int, selected: Tensor) -> None:
        """Set the selected tokens of a micro-batch, [b, s] bool, which its backward pass sends to the other stages."""
        micro_batch = self._micro_batches[index]
        micro_batch.mask, micro_batch.count = self._of_rows(selected), self.host_reads.request(selected.sum())
        if self._pipeline is not None:
            self._unsent[index] = self.host_reads.request(selected)

    def _send(self, selected: HostRead, shape: Sequence[int]) -> None:
        message = torch.tensor(selected.numbers(), dtype=torch.uint8).view(*shape)
        for stage in range(self._groups.pp_size - 1):
            work = dist.isend(message, group=self._pipeline, group_dst=stage)
            assert work is not None
            self._sent.append((work, message))

    def _receive(self, selected: SelectedTokens, shape: Sequence[int]) -> None:
        """Receive the selected tokens of a micro-batch, unless an earlier model chunk has."""
        if selected.mask is not None:
            return
        message = torch.empty(*shape, dtype=torch.uint8)
        dist.recv(message, group=self._pipeline, group_src=self._groups.pp_size - 1)
        selected.mask = self._of_rows(message.bool().to(self._groups.device, non_blocking=True))
        selected.count = int(np.count_nonzero(message.numpy()))

    def _of_rows(self, selected: Tensor) -> Tensor:
        """Return the selected tokens [b, s] in the order of the hidden states: [s, b], or [b * s, 1] if packed."""
        return selected.reshape(self._rows, -1).t()
