"""What a run measures, and where it is written: the console, a JSONL file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megatron_slm.config.recipe import to_flat_dict
from megatron_slm.config.schema import Config
from megatron_slm.model.size import forward_flops_per_token, padded_vocab_size, training_flops_per_token
from megatron_slm.objective.selective_loss import SelectiveLoss, Tokens
from megatron_slm.runtime.console import duration
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.groups import Groups

# Dense bf16 peak of one device in TFLOP/s, from NVIDIA's data sheets; model FLOP utilisation is given for these.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}


@dataclass(frozen=True)
class TokenSums:
    """Sums over tokens, which can be added over micro-batches and ranks; [6] float64."""

    values: Tensor  # loss of selected, selected, loss of valid, valid, Σ threshold, micro-batches
    fingerprint: Tensor  # int64: changes when the set of selected tokens changes, whatever their order

    @property
    def selected(self) -> int:
        """Selected tokens."""
        return int(self.values[1])

    @staticmethod
    def of(tokens: Tokens, loss: SelectiveLoss) -> TokenSums:
        """The sums of one micro-batch."""
        token_loss = tokens.loss.detach().double()
        one = token_loss.new_ones(())
        values = (
            token_loss[loss.selected].sum(),
            loss.selected.sum(),
            token_loss[tokens.valid].sum(),
            tokens.valid.sum(),
            loss.threshold.double(),
            one,
        )
        index = tokens.index[loss.selected]
        return TokenSums(torch.stack([value.double() for value in values]), (index * index + index).sum())

    @staticmethod
    def reduce(parts: list[TokenSums], groups: Groups) -> TokenSums:
        """The sums over all micro-batches and data-parallel ranks, known on every pipeline stage."""
        values = torch.zeros(6, dtype=torch.float64, device=groups.device)
        fingerprint = torch.zeros((), dtype=torch.int64, device=groups.device)
        for part in parts:
            values += part.values
            fingerprint += part.fingerprint
        for sums in (values, fingerprint):
            dist.all_reduce(sums, group=groups.dp_cp)
            dist.broadcast(sums, groups.last_stage_rank, group=groups.pp)
        return TokenSums(values, fingerprint)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; losses in nats per token."""

    step: int
    tokens: int  # consumed by the run so far
    loss: float  # over selected tokens
    loss_all: float
    loss_unselected: float | None  # None where every token was selected
    share_selected: float
    threshold: float | None  # None under CLM
    selection: str  # fingerprint of the set of selected tokens
    grad_norm: float
    lr: float
    seconds: float
    tokens_per_second: float
    tflops: float  # of the model, per device: forward and backward of θ and forward of the reference model
    mfu: float | None  # share of the device's peak; None where that is not known
    seconds_left: float
    seconds_ranking: float | None = None  # of the forward pass that only ranks the global batch; part of seconds

    def line(self, train_iters: int) -> str:
        """One line of at most 160 columns."""
        unselected = f" rest {self.loss_unselected:.4f}" if self.loss_unselected is not None else ""
        threshold = f" τ {self.threshold:+.2f}" if self.threshold is not None else ""
        mfu = f" MFU {self.mfu:.0%}" if self.mfu is not None else ""
        return (
            f"step {self.step:>{len(str(train_iters))}}/{train_iters} | loss {self.loss:.4f} all {self.loss_all:.4f}"
            f"{unselected} | selected {self.share_selected:.1%}{threshold} | norm {self.grad_norm:.2f} "
            f"lr {self.lr:.1e} | {short(self.tokens_per_second)} tok/s {self.tflops:.3g} TFLOP/s{mfu} | "
            f"{duration(self.seconds_left)} left"
        )


def short(number: float) -> str:
    """A rate in at most six characters: 950, 9,500, 95.0k, 9.50M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{number:,.0f}"


def losses_of(sums: TokenSums) -> dict[str, Any]:
    """The loss figures of :class:`StepMetrics` from reduced sums."""
    selected_loss, selected, all_loss, valid, threshold, micro_batches = sums.values.tolist()
    rest = valid - selected
    threshold /= max(micro_batches, 1)
    return {
        "loss": selected_loss / max(selected, 1),
        "loss_all": all_loss / max(valid, 1),
        "loss_unselected": (all_loss - selected_loss) / rest if rest else None,
        "share_selected": selected / max(valid, 1),
        "threshold": threshold if abs(threshold) != float("inf") else None,
        "selection": f"{int(sums.fingerprint) & (2**64 - 1):016x}",
    }


@dataclass(frozen=True)
class Throughput:
    """Turns seconds into tokens/s, TFLOP/s and MFU."""

    tokens_per_step: int
    flops_per_token: float
    world_size: int
    peak_tflops: float | None

    @staticmethod
    def of(config: Config, reference: Config | None, vocab_size: int, groups: Groups) -> Throughput:
        """For a training model and, where there is one, the forward pass of a reference model."""
        flops = training_flops_per_token(config.model, padded_vocab_size(config.model, vocab_size, 1))
        if reference is not None:
            flops += forward_flops_per_token(reference.model, padded_vocab_size(reference.model, vocab_size, 1))
        name = torch.cuda.get_device_name() if groups.device.type == "cuda" else ""
        peak = next((tflops for known, tflops in PEAK_TFLOPS.items() if known in name), None)
        batch, length = config.training.global_batch_size, config.model.seq_length
        assert batch and length, "checked by config.checks"
        return Throughput(batch * length, flops, groups.world_size, peak)

    def of_step(self, seconds: float) -> dict[str, Any]:
        """The rates of a step that took ``seconds``."""
        rate = self.tokens_per_step / seconds
        tflops = rate * self.flops_per_token / self.world_size / 1e12
        mfu = None if self.peak_tflops is None else tflops / self.peak_tflops
        return {"seconds": seconds, "tokens_per_second": rate, "tflops": tflops, "mfu": mfu}


class Sink(Protocol):
    """A place for records: dictionaries with "kind" ("train" or "eval"), "step" and figures."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line; on a resume, lines of steps that will be run again are dropped first."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text("".join(_lines_until(path, resumed_step)), encoding="utf-8")
            partial.replace(path)
            self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        with self._explained():
            self.file.write(json.dumps(record) + "\n")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"--slm-metrics-file {self.path}: cannot be written ({error.strerror}). Is the disk full, or the "
                "folder read-only?"
            ) from error

    def close(self) -> None:
        self.file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of an earlier run up to ``step``; one that a kill cut short is dropped with what follows it."""
    kept: list[str] = []
    if step and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                break
    return kept


class TensorBoardSink:
    """Scalars named kind/figure, evaluation also by set; the x axis is the step."""

    def __init__(self, folder: str, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """The same scalars to Weights & Biases."""

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb-project needs the package wandb: pip install wandb.") from error
        own = config.logging
        self.run = wandb.init(
            project=own.wandb_project,
            name=own.wandb_exp_name,
            dir=own.wandb_save_dir,
            config=to_flat_dict(config),
        )

    def write(self, record: dict[str, Any]) -> None:
        self.run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record under the names that TensorBoard and W&B show."""
    prefix = f"{record['kind']}/{record['set']}" if "set" in record else record["kind"]
    return {
        f"{prefix}/{name}": value for name, value in record.items() if isinstance(value, int | float) and name != "step"
    }


def metrics_file(config: Config) -> Path | None:
    """Where the JSONL goes, if anywhere."""
    if config.logging.slm_metrics_file:
        return Path(config.logging.slm_metrics_file)
    return Path(config.checkpoint.save) / "metrics.jsonl" if config.checkpoint.save else None


def open_sinks(config: Config, groups: Groups, resumed_step: int) -> list[Sink]:
    """The files and services that the flags ask for; none on ranks other than 0."""
    if not groups.is_logging_rank:
        return []
    sinks: list[Sink] = []
    if (path := metrics_file(config)) is not None:
        sinks.append(JsonlSink(path, resumed_step))
    if config.logging.tensorboard_dir:
        sinks.append(TensorBoardSink(config.logging.tensorboard_dir, resumed_step))
    if config.logging.wandb_project:
        sinks.append(WandbSink(config))
    return sinks


def print_settings(console: Console, config: Config) -> None:
    """The settings that differ from the defaults, as a few wrapped lines."""
    defaults = to_flat_dict(Config())
    changed = {name: value for name, value in to_flat_dict(config).items() if value != defaults[name]}
    console.print("  ".join(f"{name}={value}" for name, value in changed.items()), style="dim", soft_wrap=False)
