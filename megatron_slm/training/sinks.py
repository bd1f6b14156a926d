"""Sinks for training records: JSONL file, TensorBoard, and Weights & Biases.

A full disk or an unreachable service delays records but never stops a run. A path that cannot be opened at start-up is
an error.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_slm.config.paths import events_file, metrics_file
from megatron_slm.config.recipe import to_flat_dict
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.append import AppendFile, PatientWriter
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import explained_write, write_text
from megatron_slm.runtime.groups import Groups
from megatron_slm.runtime.metrics_file import EVENTS_FLAG, METRICS_FLAG, prepare_metrics_file

WANDB_ID_FILE = "wandb_run_id.txt"


class Sink(Protocol):
    """Write records: dictionaries with "kind" ("train", "eval" or "task"), "step" and metrics."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class FileSink:
    """Encode records and append them to a file, tolerating a temporarily full disk."""

    def __init__(self, path: Path, flag: str, encode: Callable[[dict[str, Any]], bytes], head: bytes = b"") -> None:
        file = AppendFile(path, flag)
        self.writer = PatientWriter(file, flag, warn)
        self.encode = encode
        if head:
            self.writer.write(head)

    def write(self, record: dict[str, Any]) -> None:
        self.writer.write(self.encode(record))

    def close(self) -> None:
        self.writer.close()


def open_sinks(config: RunConfig, groups: Groups, resumed_step: int) -> list[Sink]:
    """Open the configured files and services on rank 0; return an empty list on other ranks.

    Args:
        resumed_step: completed steps of the run. Metrics of later steps are dropped, since these steps are repeated;
            events of later steps, which may be the reason of the resume, are not.
    """
    if not groups.is_logging_rank:
        return []
    logging, evaluates_only = config.logging, config.training.skip_train
    sinks: list[Sink] = []
    if (path := metrics_file(config)) is not None:
        if not evaluates_only and (kept := prepare_metrics_file(path, resumed_step)) is not None:
            warn(f"{METRICS_FLAG} {path}: the metrics of an earlier run were kept as {kept}.")
        sinks.append(FileSink(path, METRICS_FLAG, lambda record: json.dumps(record).encode() + b"\n"))
    events = None if evaluates_only or resumed_step else events_file(config)
    if events is not None and (kept := prepare_metrics_file(events, 0, EVENTS_FLAG)) is not None:
        warn(f"{EVENTS_FLAG} {events}: the events of an earlier run were kept as {kept}.")
    if logging.tensorboard_dir:
        sinks.append(tensorboard_sink(Path(logging.tensorboard_dir), 0 if evaluates_only else resumed_step))
    if logging.wandb_project:
        sinks.append(WandbSink(config, resumed_step))
    return sinks


@contextmanager
def closing_all(sinks: Sequence[Sink]) -> Iterator[None]:
    """Close all sinks when the block ends, also after an exception."""
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        yield


def tensorboard_sink(directory: Path, resumed_step: int) -> FileSink:
    """Return a TensorBoard sink of scalars named kind/metric, with the step on the x axis.

    torch's SummaryWriter is not used, since its thread fails with a traceback if the disk is full, and loses all
    later records.
    """
    seconds, fraction = divmod(time.time_ns(), 10**9)  # TensorBoard reads the files of a directory by name
    name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{fraction:09d}"
    return FileSink(directory / name, "--tensorboard-dir", _events, _event_head(resumed_step))


def _event_head(resumed_step: int) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    events = [Event(wall_time=time.time(), file_version="brain.Event:2")]
    if resumed_step:  # TensorBoard discards events from this step
        start = SessionLog(status=SessionLog.START)
        events.append(Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))
    return _framed(events)


def _events(record: dict[str, Any]) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
    return _framed([Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))])


def _framed(events: list[Any]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Return the numeric values of a record by their TensorBoard and W&B names."""
    prefix = f"{record['kind']}/{record['set']}" if "set" in record else record["kind"]
    return {
        f"{prefix}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name != "step"
    }


class WandbSink:
    """Log scalars to Weights & Biases. A resumed run continues its W&B run, whose id is stored in --save."""

    def __init__(self, config: RunConfig, resumed_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--wandb-project: the package wandb cannot be imported ({error}). Install it again: pip install wandb."
            ) from error
        logging, checkpoint = config.logging, config.checkpoint
        identity = os.environ.get("WANDB_RUN_ID")
        if identity is None and resumed_step:
            identity = _saved_identity(checkpoint.save) or _saved_identity(checkpoint.load)
        identity = identity or secrets.token_hex(4)
        self.errors = (OSError, getattr(wandb, "Error", OSError))
        try:
            self.run = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                dir=logging.wandb_save_dir,
                config=to_flat_dict(config),
                id=identity,
                resume="allow",
            )
        except self.errors as error:
            raise ConfigError(
                f"--wandb-project: W&B cannot be started: {error}. Check its login, or set WANDB_MODE=offline."
            ) from error
        if checkpoint.save and not config.training.skip_train:
            with explained_write(checkpoint.save, "--save"):
                Path(checkpoint.save).mkdir(parents=True, exist_ok=True)
            write_text(Path(checkpoint.save) / WANDB_ID_FILE, f"{identity}\n", "--save")
        self.has_failed = False

    def write(self, record: dict[str, Any]) -> None:
        try:
            self.run.log(scalars(record), step=record["step"])
        except self.errors as error:
            if not self.has_failed:
                warn(f"--wandb-project: W&B rejects records ({error}). The run continues.")
            self.has_failed = True

    def close(self) -> None:
        try:
            self.run.finish()
        except self.errors as error:
            warn(f"--wandb-project: W&B cannot finish its run ({error}).")


def _saved_identity(directory: str | None) -> str | None:
    path = Path(directory or "") / WANDB_ID_FILE
    return path.read_text(encoding="utf-8").strip() or None if directory and path.is_file() else None
