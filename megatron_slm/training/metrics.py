"""Training metrics: token sums, step metrics, console lines, and throughput."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megatron_slm.config.recipe import to_flat_dict
from megatron_slm.config.schema import RunConfig
from megatron_slm.model.size import forward_flops_per_token, padded_vocab_size, training_flops_per_token
from megatron_slm.objective.selective_loss import SelectiveLoss
from megatron_slm.objective.tokens import TokenBatch, diverged_tokens
from megatron_slm.runtime.collective import all_reduce_sum, broadcast_from_last_stage
from megatron_slm.runtime.console import format_duration
from megatron_slm.runtime.groups import Groups
from megatron_slm.training.memory_use import MemoryUse

# Dense bf16 peak per device in TFLOP/s, from NVIDIA's data sheets; used for model FLOPs utilization (MFU).
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
SETTINGS_WIDTH = 160  # columns of the printed settings


@dataclass(frozen=True)
class TokenSums:
    """Hold sums over tokens, additive over micro-batches and ranks; [7] float64."""

    values: Tensor  # loss of selected, selected, loss of valid, valid, Σ threshold, micro-batches, diverged
    fingerprint: Tensor  # int64 hash of the set of selected tokens, independent of their order

    @property
    def numbers(self) -> list[float]:
        """Return the values on the host."""
        return self._on_host[:-2]

    @property
    def selection(self) -> str:
        """Return the fingerprint as hexadecimal digits."""
        high, low = map(int, self._on_host[-2:])
        return _hexadecimal(high << 32 | low)

    @cached_property
    def _on_host(self) -> list[float]:
        """Return the values and both halves of the fingerprint, read from the device together at the first access."""
        halves = torch.stack((self.fingerprint >> 32, self.fingerprint & 0xFFFFFFFF))
        return torch.cat((self.values, halves.double())).tolist()

    @property
    def selected(self) -> int:
        """Return the number of selected tokens."""
        return int(self.numbers[1])

    @property
    def diverged(self) -> int:
        """Return the number of valid tokens with a NaN or infinite loss."""
        return int(self.numbers[6])

    @staticmethod
    def from_micro_batch(tokens: TokenBatch, loss: SelectiveLoss) -> TokenSums:
        """Return the sums of one micro-batch."""
        token_loss = tokens.loss.detach().double()
        one = token_loss.new_ones(())
        values = (
            token_loss.where(loss.selected, 0.0).sum(),
            loss.selected.sum(),
            token_loss.where(tokens.valid, 0.0).sum(),
            tokens.valid.sum(),
            loss.threshold.double(),
            one,
            diverged_tokens(tokens).sum(),
        )
        index = tokens.global_token_index.where(loss.selected, 0)
        return TokenSums(torch.stack([value.double() for value in values]), (index * index + index).sum())

    @staticmethod
    def reduce(parts: list[TokenSums], groups: Groups) -> TokenSums:
        """Return the sums over all micro-batches and data-parallel ranks, broadcast to every pipeline stage."""
        total = TokenSums.add(parts, groups.device)
        for sums in (total.values, total.fingerprint):
            broadcast_from_last_stage(all_reduce_sum(sums, groups.dp_cp), groups.pp)
        return total

    @staticmethod
    def add(parts: Iterable[TokenSums], device: torch.device) -> TokenSums:
        """Return the sums of several micro-batches or steps."""
        values = torch.zeros(7, dtype=torch.float64, device=device)
        fingerprint = torch.zeros((), dtype=torch.int64, device=device)
        for part in parts:
            values += part.values
            fingerprint += part.fingerprint
        return TokenSums(values, fingerprint)


@dataclass(frozen=True)
class StepMetrics:
    """Represent the metrics of a step, or of the steps of a log interval; losses in nats per token.

    Losses, the selected share, the threshold and times are unweighted means over the steps; the selection ratio is that
    of the last step, and the gradient norm and the learning rate are, as in Megatron-LM, those of the last step whose
    update was not skipped. Weights do not enter the losses.
    """

    step: int
    tokens: int  # consumed by the run so far
    loss: float  # over selected tokens
    loss_all: float
    loss_unselected: float | None  # None if every token was selected
    share_selected: float
    threshold: float | None  # None under CLM
    selection: str  # fingerprint of the set of selected tokens
    grad_norm: float | None  # None if the gradients of all steps overflowed fp16
    lr: float
    seconds: float
    tokens_per_second: float
    tflops: float  # of the model, per device: forward and backward of θ and forward of the reference model
    mfu: float | None  # share of the device's peak; None if unknown
    seconds_left: float
    seconds_ranking: float | None = None  # time of the ranking pass, included in seconds
    loss_scale: float | None = None  # of the last step; None without dynamic loss scaling
    ratio: float | None = None  # the run's selection ratio in the last step; None if it selects no tokens
    steps_skipped: int | None = None  # steps without update, since gradients overflowed fp16; None without scaling
    global_batch_size: int | None = None  # of the last step; None if it is constant
    memory: int | None = None  # bytes of rank 0: allocated on a GPU, resident set on a CPU
    memory_peak: int | None = None  # since the start of the process
    memory_reserved: int | None = None  # by torch's allocator on a GPU
    slowest_rank: int | None = None  # with the most work compared with its stage; None if it was not determined
    slowest_rank_ratio: float | None = None  # of its work per step to the median of its stage

    def line(self, train_iters: int, width: int | None = None) -> str:
        """Return a console line, shortened to ``width`` columns by omitting the least important metrics."""
        figures = self._figures(train_iters)
        while width is not None and len(_join(figures)) > width and len(figures) > 2:
            figures.remove(max(figures, key=lambda figure: figure.rank))
        return _join(figures)

    def _figures(self, train_iters: int) -> list[_Figure]:
        figures = [
            _Figure(0, 0, f"step {self.step:>{len(str(train_iters))}}/{train_iters}"),
            _Figure(1, 1, f"loss {self.loss:.4f}"),
            _Figure(1, 6, f"all {self.loss_all:.4f}"),
            _Figure(1, 9, f"rest {self.loss_unselected:.4f}") if self.loss_unselected is not None else None,
            _Figure(2, 5, f"selected {self.share_selected:.1%}"),
            _Figure(2, 8, f"τ {self.threshold:+.2f}") if self.threshold is not None else None,
            _Figure(3, 7, f"norm {self.grad_norm:.2f}") if self.grad_norm is not None else None,
            _Figure(3, 4, f"lr {self.lr:.1e}"),
            _Figure(3, 8, f"batch {self.global_batch_size}") if self.global_batch_size is not None else None,
            _Figure(3, 8, f"scale {self.loss_scale:g}") if self.loss_scale is not None else None,
            _Figure(3, 2, f"skipped {self.steps_skipped}") if self.steps_skipped else None,
            _Figure(4, 3, f"{short(self.tokens_per_second)} tok/s"),
            _Figure(4, 10, f"{self.tflops:.3g} TFLOP/s"),
            _Figure(4, 11, f"MFU {self.mfu:.0%}") if self.mfu is not None else None,
            self._memory_figure(),
            _Figure(5, 2, f"{format_duration(self.seconds_left)} left"),
        ]
        return [figure for figure in figures if figure is not None]

    def _memory_figure(self) -> _Figure | None:
        if self.memory is None or self.memory_peak is None:
            return None
        return _Figure(4, 12, f"memory {MemoryUse(self.memory, self.memory_peak, self.memory_reserved)}")


@dataclass(frozen=True)
class _Figure:
    """Represent one metric of a console line: its group, its importance (0 is highest), and its text."""

    group: int
    rank: int
    text: str


def _join(figures: list[_Figure]) -> str:
    groups = groupby(figures, key=lambda figure: figure.group)
    return " | ".join(" ".join(figure.text for figure in group) for _, group in groups)


def short(number: float) -> str:
    """Format a rate in at most six characters, such as 950, 9,500, 95.0k or 9.50M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{number:,.0f}"


def step_losses(sums: TokenSums) -> dict[str, Any]:
    """Return the loss fields of :class:`StepMetrics` for one step from its reduced sums."""
    selected_loss, selected, all_loss, valid, threshold, micro_batches, _ = sums.numbers
    rest = valid - selected
    threshold /= max(micro_batches, 1)
    return {
        "loss": selected_loss / max(selected, 1),
        "loss_all": all_loss / max(valid, 1),
        "loss_unselected": (all_loss - selected_loss) / rest if rest else None,
        "share_selected": selected / max(valid, 1),
        "threshold": threshold if abs(threshold) != float("inf") else None,
        "selection": sums.selection,
    }


def interval_losses(steps: Sequence[TokenSums]) -> dict[str, Any]:
    """Return the loss fields of :class:`StepMetrics` for a log interval from the reduced sums of its steps."""
    figures = [step_losses(sums) for sums in steps]
    known = {name: [each[name] for each in figures if each[name] is not None] for name in figures[0]}
    means = {name: fmean(values) if values else None for name, values in known.items() if name != "selection"}
    return {**means, "selection": _hexadecimal(sum(int(each["selection"], 16) for each in figures))}


def _hexadecimal(value: int) -> str:
    return f"{value & (2**64 - 1):016x}"


@dataclass(frozen=True)
class Throughput:
    """Convert step times to tokens/s, TFLOP/s and MFU."""

    flops_per_token: float
    world_size: int
    peak_tflops: float | None

    @staticmethod
    def from_config(config: RunConfig, references: Sequence[RunConfig], vocab_size: int, groups: Groups) -> Throughput:
        """Return the throughput of a training model, including the forward passes of reference models."""
        flops = training_flops_per_token(config.model, padded_vocab_size(config.model, vocab_size, 1))
        for reference in references:
            model = replace(reference.model, seq_length=config.model.seq_length)  # may be shorter than in training
            flops += forward_flops_per_token(model, padded_vocab_size(model, vocab_size, 1))
        name = torch.cuda.get_device_name() if groups.device.type == "cuda" else ""
        peak = next((tflops for known, tflops in PEAK_TFLOPS.items() if known in name), None)
        return Throughput(flops, groups.world_size, peak)

    def step_rates(self, seconds: float, tokens: float) -> dict[str, Any]:
        """Return the throughput fields of :class:`StepMetrics` for a step of ``tokens`` tokens in ``seconds``."""
        rate = tokens / seconds
        tflops = rate * self.flops_per_token / self.world_size / 1e12
        mfu = None if self.peak_tflops is None else tflops / self.peak_tflops
        return {"seconds": seconds, "tokens_per_second": rate, "tflops": tflops, "mfu": mfu}


def print_settings(console: Console, config: RunConfig) -> None:
    """Print the settings that differ from the defaults."""
    defaults = to_flat_dict(RunConfig())
    changed = {name: value for name, value in to_flat_dict(config).items() if value != defaults[name]}
    text = "  ".join(f"{name}={value}" for name, value in changed.items())
    console.print(text, style="dim", soft_wrap=False, width=min(console.width, SETTINGS_WIDTH), markup=False)
