"""Training loop: step, log, save and evaluate until the last step or an early stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from rich.console import Console

from megatron_slm.config.batch_sizes import BatchSizes
from megatron_slm.config.paths import metrics_file
from megatron_slm.config.schema import RunConfig
from megatron_slm.data.batches import BatchShape, BatchStream, MicroBatch
from megatron_slm.data.datasets import Datasets
from megatron_slm.evaluation.evaluate import EncodedTask, TaskResult
from megatron_slm.reference.bubbles import BubbleReference
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.console import UNBOUNDED
from megatron_slm.runtime.health.progress import progress as health
from megatron_slm.runtime.health.work_time import count_step
from megatron_slm.runtime.metrics_file import evaluated_sets
from megatron_slm.runtime.resiliency import Heartbeat
from megatron_slm.runtime.signals import StopSignals
from megatron_slm.training.benchmarks import evaluate_benchmarks, score_line, score_record
from megatron_slm.training.clock import Schedule, StepClock
from megatron_slm.training.curriculum import selection_ratio
from megatron_slm.training.evaluation import Evaluation, evaluate
from megatron_slm.training.events import StepMonitor
from megatron_slm.training.garbage import ManualCollection
from megatron_slm.training.memory_use import MemoryUse
from megatron_slm.training.metrics import StepMetrics, Throughput, interval_losses
from megatron_slm.training.profiling import StepProfiler, write_memory_snapshot
from megatron_slm.training.save_directory import record_stop
from megatron_slm.training.saver import Saver
from megatron_slm.training.sinks import Sink
from megatron_slm.training.state import TrainProgress, TrainState
from megatron_slm.training.step import ReferenceSource, Step, StepObserver, train_step
from megatron_slm.training.stopping import StopDecision
from megatron_slm.training.stragglers import StragglerLog

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Hold the components of a training run."""

    config: RunConfig
    state: TrainState
    datasets: Datasets
    shape: BatchShape
    reference: ReferenceSource
    bubbles: BubbleReference | None  # if the reference source scores the next step's micro-batches ahead
    throughput: Throughput
    benchmarks: list[EncodedTask]
    sinks: list[Sink]
    console: Console

    @cached_property
    def sizes(self) -> BatchSizes:
        """Return the global batch sizes of the run."""
        return BatchSizes.from_config(self.config.training)

    @property
    def progress(self) -> TrainProgress:
        return self.state.progress

    @property
    def tokens(self) -> int:
        """Return the number of consumed tokens."""
        return self.progress.consumed_samples * self.config.model.seq_length


def train(run: Run, signals: StopSignals | None = None) -> None:
    """Train from ``run.progress`` to --train-iters, or until the run has to stop."""
    stop = StopDecision(run.state.groups, signals, run.config.training.exit_duration_in_mins)
    loop = _Loop(run, stop)
    if run.config.training.skip_train:
        with _slow_end():
            loop.evaluate()
        return
    record_stop(run.config.checkpoint.save, None)
    with loop.collection.replacing_automatic(), loop.saver.finishing(), _slow_end():
        _train(run, loop, stop)
    record_stop(run.config.checkpoint.save, stop.reason)


@contextmanager
def _slow_end() -> Iterator[None]:
    """Let the end of a run, also after an error, take long without signs of life."""
    try:
        yield
    finally:
        health.enter("finishing", slow=True)


def _train(run: Run, loop: _Loop, stop: StopDecision) -> None:
    loop.evaluate_at_start()
    reason = loop.steps()
    if reason is not None:
        run.console.print(f"stopping after step {run.progress.step}: {reason}")
    loop.save()
    loop.saver.finish()
    if stop.reason is None:  # otherwise the remaining time may be too short
        loop.evaluate()


class _Loop:
    """Run steps and track the last logged, saved and evaluated step."""

    def __init__(self, run: Run, stop: StopDecision) -> None:
        training, logs, checkpoint = run.config.training, run.config.logging, run.config.checkpoint
        self.run, self.stop = run, stop
        self.iterations = training.train_iters
        self.clock = StepClock(Schedule(self.iterations, logs.eval_interval, checkpoint.save_interval))
        self.saver = Saver(run.state, run.config, run.console)
        self.monitor = StepMonitor(run.state, run.config, run.datasets.train)
        self.profiler = StepProfiler(run.config, run.state.groups, run.console)
        self.collection = ManualCollection(run.config.diagnostics)
        self.saved, self.evaluated = run.progress.step, -1
        self.stragglers = StragglerLog(run.config)
        self.heartbeat = Heartbeat()
        self.unlogged: list[Step] = []
        self.logged = replace(run.progress)  # at the last log line
        self.batch = 0  # samples of the last step

    def steps(self) -> str | None:
        """Run steps, and return the reason for an early stop, if any."""
        run, config = self.run, self.run.config
        stream = training_stream(run)
        self.clock.start()
        try:
            while run.progress.step < self.iterations and not self.stop.agreed():
                self.batch = run.sizes.at(run.progress.consumed_samples)
                self.profiler.before_step(run.progress.step)
                if (trained := one_step(run, stream, self.monitor.accept)) is not None:
                    self.unlogged.append(trained)
                step = run.progress.step
                if config.diagnostics.profile:
                    health.enter("profiling", slow=True)  # traces are large
                self.profiler.after_step(step)
                self.collection.after_step(step)
                self.clock.tick(self.batch)
                self.heartbeat.send()
                self.saver.poll()
                logger.info("step %d", step)
                if self.unlogged and (_is_due(step, config.logging.log_interval) or step == self.iterations):
                    self._log()
                if _is_due(step, config.checkpoint.save_interval):
                    self.save()
                if _is_due(step, config.logging.eval_interval):
                    self.evaluate()
                if _is_due(step, config.training.exit_interval) and step < self.iterations:
                    return f"--exit-interval {config.training.exit_interval}"
        finally:
            stream.close()
            self.profiler.close()
            self.heartbeat.close()
            if self.unlogged:
                self._log()
        return self.stop.reason

    def evaluate_at_start(self) -> None:
        """Evaluate a new model, or complete the evaluation at the resumed step. Collective over all ranks."""
        step, config = self.run.progress.step, self.run.config
        if step == 0:
            self.evaluate()
        elif _is_due(step, config.logging.eval_interval):
            self.evaluate(on_first_rank(lambda: evaluated_sets(metrics_file(config), step)))

    def evaluate(self, logged: Collection[tuple[str, str]] = ()) -> None:
        """Evaluate validation sets and benchmarks and log the results, unless this step is already evaluated.

        Args:
            logged: kind and name of results of this step that are not needed again.
        """
        run, config = self.run, self.run.config
        sets = run.datasets.valid if config.logging.eval_iters else {}
        sets = {name: samples for name, samples in sets.items() if ("eval", name) not in logged}
        benchmarks = [encoded for encoded in run.benchmarks if ("task", encoded.task.name) not in logged]
        if self.evaluated == run.progress.step or not (sets or benchmarks):
            return
        logger.info("evaluating at step %d", run.progress.step)
        with self.clock.evaluating(), self.collection.around_evaluation():
            health.enter("evaluating")
            losses = evaluate(run.state, sets, config, run.shape, self.stop.agreed)
            health.enter("evaluating benchmarks", slow=True)
            scores = evaluate_benchmarks(run.state, benchmarks, config, self.stop.agreed)
        if losses:
            self._log_losses(losses)
        if scores:
            self._log_scores(scores)
        if losses or scores:
            self.evaluated = run.progress.step

    def _log_losses(self, results: dict[str, Evaluation]) -> None:
        """Log the held-out losses of the validation sets."""
        run = self.run
        line = "  ".join(f"{name} {result}" for name, result in results.items())
        run.console.print(f"held-out loss at step {run.progress.step}: {line}", style="bold", markup=False)
        for name, result in results.items():
            record = {"step": run.progress.step, "tokens": run.tokens, "set": name, "loss": result.loss}
            sizes = {"tokens_evaluated": result.tokens, "bytes_evaluated": result.bytes}
            for sink in run.sinks:
                sink.write({"kind": "eval", **record, "bits_per_byte": result.bits_per_byte, **sizes})

    def _log_scores(self, results: list[TaskResult]) -> None:
        """Log the scores of benchmarks."""
        run = self.run
        line = "  ".join(map(score_line, results))
        run.console.print(f"benchmarks at step {run.progress.step}: {line}", style="bold", markup=False)
        for result in results:
            record = {"step": run.progress.step, "tokens": run.tokens, "set": result.task}
            for sink in run.sinks:
                sink.write({"kind": "task", **record, **score_record(result)})

    def save(self) -> None:
        """Save a checkpoint, unless --save is missing or this step is already saved."""
        run = self.run
        if run.config.checkpoint.save is None or self.saved == run.progress.step:
            return
        logger.info("saving step %d", run.progress.step)
        health.enter("saving a checkpoint", slow=True)
        with self.clock.saving():
            self.saver.save()
        self.saved = run.progress.step

    def _samples_left(self) -> int:
        consumed = self.run.progress.consumed_samples
        return self.run.sizes.consumed_after(self.iterations - self.run.progress.step, consumed) - consumed

    def _log(self) -> None:
        """Log the mean losses and times of the steps since the last log."""
        health.enter("logging")
        run, steps, last = self.run, self.unlogged, self.unlogged[-1]
        ranking = [step.seconds_ranking for step in steps if step.seconds_ranking is not None]
        norms = [step.grad_norm for step in steps if not step.overflow]
        tokens = (run.progress.consumed_samples - self.logged.consumed_samples) * run.config.model.seq_length
        seconds, interval = self.clock.seconds_per_step(), run.progress.step - self.logged.step
        self.logged = replace(run.progress)
        memory = MemoryUse.measure(run.state.groups.device)
        logger.info("memory %s", memory)
        metrics = StepMetrics(
            step=run.progress.step,
            tokens=run.tokens,
            grad_norm=norms[-1] if norms else None,
            lr=last.lr,
            ratio=last.ratio if run.state.selection.config.uses_ratio else None,
            seconds_left=self.clock.seconds_left(run.progress.step, self._samples_left()),
            seconds_ranking=math.fsum(ranking) / len(ranking) if ranking else None,
            loss_scale=last.loss_scale,
            steps_skipped=len(steps) - len(norms) if last.loss_scale is not None else None,
            **interval_losses([step.sums for step in steps]),
            memory=memory.current,
            memory_peak=memory.peak,
            memory_reserved=memory.reserved,
            global_batch_size=None if run.sizes.is_constant else self.batch,
            **run.throughput.step_rates(seconds, tokens / interval),
            **self.stragglers.update(),
        )
        self.unlogged = []
        width = run.console.width if run.console.width < UNBOUNDED else None
        run.console.print(metrics.line(self.iterations, width), markup=False)
        for sink in run.sinks:
            sink.write({"kind": "train", **asdict(metrics)})
        write_memory_snapshot(run.config, run.state.groups.rank)


def training_stream(run: Run) -> Generator[list[MicroBatch], None, None]:
    """Yield the training batches from the progress of the run.

    If the reference source works ahead, it receives the batches of the next step, unless they are not trained on.
    """
    stream = BatchStream(
        run.datasets.train,
        run.shape,
        device=run.state.groups.device,
        sizes=run.sizes,
        start_sample=run.progress.consumed_samples,
        read_ahead=run.config.data.num_workers,
    )
    upcoming = None
    try:
        while True:
            current = next(stream) if upcoming is None else upcoming
            if run.bubbles is not None:
                following, training = run.progress.step + 2, run.config.training
                upcoming = next(stream) if following <= training.train_iters else None
                run.bubbles.upcoming = None if following in training.iterations_to_skip else upcoming
            yield current
    finally:
        stream.close()


def one_step(run: Run, stream: Iterator[Sequence[MicroBatch]], observer: StepObserver) -> Step | None:
    """Run the next step, and advance the progress of the run. Collective over all ranks.

    Returns:
        the step, or None if it is one of --iterations-to-skip: its samples are consumed, and the schedule advances.
    """
    progress = run.progress
    health.enter("loading a batch", progress.step + 1)
    start = time.perf_counter()
    batches = next(stream)
    seconds_loading = time.perf_counter() - start
    if progress.step + 1 in run.config.training.iterations_to_skip:
        run.console.print(f"step {progress.step + 1} is skipped (--iterations-to-skip)")
        _advance(run)
        return None
    step_tokens = run.sizes.at(progress.consumed_samples) * run.config.model.seq_length
    ratio, next_ratio = (
        selection_ratio(run.config.objective, progress.step + ahead, run.tokens + ahead * step_tokens)
        for ahead in (0, 1)
    )
    health.enter("training")
    step = train_step(
        run.state, batches, ratio=ratio, next_ratio=next_ratio, reference=run.reference, observer=observer
    )
    count_step(seconds_loading)
    _advance(run, scheduled=not step.overflow)
    return step


def _advance(run: Run, *, scheduled: bool = True) -> None:
    """Advance the progress, and the schedule unless the update was skipped due to an overflow, as in Megatron-LM.

    The history of the model advances with the progress. Collective over all ranks.
    """
    batch = run.sizes.at(run.progress.consumed_samples)
    if scheduled:
        run.state.scheduler.step(increment=batch)
    run.progress.step += 1
    run.progress.consumed_samples += batch
    run.state.update_history()


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
