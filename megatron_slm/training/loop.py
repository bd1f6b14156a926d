"""The training loop: load, reference, step, log, evaluate, save."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

from rich.console import Console

from megatron_slm.config.schema import Config
from megatron_slm.data.batches import BatchShape, BatchStream
from megatron_slm.data.datasets import Datasets
from megatron_slm.objective.selective_loss import Selector
from megatron_slm.runtime.console import duration
from megatron_slm.runtime.errors import DivergedError
from megatron_slm.runtime.signals import StopSignal
from megatron_slm.training.checkpoint import Position, Trainable, save_checkpoint
from megatron_slm.training.evaluation import evaluate
from megatron_slm.training.metrics import Sink, StepMetrics, Throughput, losses_of
from megatron_slm.training.step import ReferenceSource, Step, selection_ratio, train_step


@dataclass
class Run:
    """Everything that a training run works with."""

    config: Config
    trainable: Trainable
    datasets: Datasets
    shape: BatchShape
    selector: Selector
    reference: ReferenceSource | None
    throughput: Throughput
    sinks: list[Sink]
    console: Console
    position: Position = field(default_factory=Position)

    @property
    def tokens(self) -> int:
        """Tokens that the run has consumed."""
        return self.position.consumed_samples * (self.config.model.seq_length or 0)


def train(run: Run) -> None:
    """Train from ``run.position`` to --train-iters, or until there is a reason to stop earlier."""
    config, position = run.config, run.position
    iterations = config.training.train_iters or 0
    stop_signal = StopSignal() if config.training.exit_signal_handler else None
    clock = _Clock(position.step, iterations)
    stream = BatchStream(
        run.datasets.train,
        run.shape,
        device=run.trainable.groups.device,
        start_sample=position.consumed_samples,
        read_ahead=config.data.num_workers,
    )
    evaluated = saved = position.step
    if position.step == 0:
        evaluate_and_log(run)
    try:
        while position.step < iterations:
            step = _one_step(run, stream)
            clock.tick(position.step)
            if position.step % config.logging.log_interval == 0 or position.step == iterations:
                _log_step(run, step, clock)
            if _due(position.step, config.logging.eval_interval):
                evaluate_and_log(run)
                evaluated = position.step
                clock.pause_ends()
            if config.checkpoint.save and _due(position.step, config.checkpoint.save_interval):
                _save(run)
                saved = position.step
                clock.pause_ends()
            if reason := _reason_to_stop(run, clock, stop_signal):
                run.console.print(f"stopping after step {position.step}: {reason}")
                break
    finally:
        stream.close()
    if evaluated != position.step:
        evaluate_and_log(run)
    if config.checkpoint.save and saved != position.step:
        _save(run)


def evaluate_and_log(run: Run) -> None:
    """Evaluate every validation set and write the result to the console and all sinks."""
    if not run.datasets.valid or run.config.logging.eval_iters == 0:
        return
    results = evaluate(run.trainable, run.datasets.valid, run.config, run.shape)
    line = "  ".join(f"{name} {result.loss:.4f}" for name, result in results.items())
    run.console.print(f"held-out loss at step {run.position.step}: {line}", style="bold")
    for name, result in results.items():
        record = {"step": run.position.step, "tokens": run.tokens, "set": name, "loss": result.loss}
        for sink in run.sinks:
            sink.write({"kind": "eval", **record, "tokens_evaluated": result.tokens})


def _one_step(run: Run, stream: BatchStream) -> Step:
    position = run.position
    ratio, next_ratio = (selection_ratio(run.config.objective, position.step + ahead) for ahead in (0, 1))
    try:
        step = train_step(
            run.trainable,
            next(stream),
            run.selector,
            ratio=ratio,
            next_ratio=next_ratio,
            reference=run.reference,
        )
    except DivergedError as error:
        rank = run.trainable.groups.rank
        raise DivergedError(f"step {position.step + 1}, rank {rank}: {error}") from error
    position.step += 1
    position.consumed_samples += run.shape.global_batch_size
    return step


def _log_step(run: Run, step: Step, clock: _Clock) -> None:
    seconds = clock.seconds_per_step()
    metrics = StepMetrics(
        step=run.position.step,
        tokens=run.tokens,
        grad_norm=step.grad_norm,
        lr=step.lr,
        seconds_left=clock.seconds_left(run.position.step),
        seconds_ranking=step.seconds_ranking,
        **losses_of(step.sums),
        **run.throughput.of_step(seconds),
    )
    run.console.print(metrics.line(run.config.training.train_iters or 0))
    for sink in run.sinks:
        sink.write({"kind": "train", **asdict(metrics)})


def _save(run: Run) -> None:
    began = time.perf_counter()
    where = save_checkpoint(run.trainable, run.position, run.config)
    run.console.print(f"saved {where} in {duration(time.perf_counter() - began)}")


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _reason_to_stop(run: Run, clock: _Clock, stop_signal: StopSignal | None) -> str | None:
    training = run.config.training
    if _due(run.position.step, training.exit_interval):
        return f"--exit-interval {training.exit_interval}"
    limit = training.exit_duration_in_mins
    if limit is not None and clock.minutes() > limit:
        return f"--exit-duration-in-mins {limit}"
    if stop_signal is not None and stop_signal.agreed(run.trainable.groups):
        return "a signal asked for it"
    return None


class _Clock:
    """Times steps; evaluations and checkpoints between them do not count."""

    def __init__(self, first_step: int, iterations: int) -> None:
        self.iterations = iterations
        self.began = self.last = time.perf_counter()
        self.first_step = first_step
        self.logged_step, self.since_log = first_step, 0.0
        self.spent, self.counted = 0.0, 0

    def tick(self, step: int) -> None:
        now = time.perf_counter()
        self.since_log += now - self.last
        if step > self.first_step + 1:  # the first step also warms up
            self.spent += now - self.last
            self.counted += 1
        self.last = now
        self.step = step

    def pause_ends(self) -> None:
        self.last = time.perf_counter()

    def seconds_per_step(self) -> float:
        """Mean since the last call."""
        mean = self.since_log / max(self.step - self.logged_step, 1)
        self.logged_step, self.since_log = self.step, 0.0
        return mean

    def seconds_left(self, step: int) -> float:
        mean = self.spent / self.counted if self.counted else time.perf_counter() - self.began
        return mean * (self.iterations - step)

    def minutes(self) -> float:
        return (time.perf_counter() - self.began) / 60
