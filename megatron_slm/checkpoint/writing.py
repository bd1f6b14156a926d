"""Write the files of a distributed checkpoint with Megatron-Core, in this process or in a child process.

Each rank writes its files, computes their checksums, and leaves a record in the checkpoint directory. Rank 0 completes
the checkpoint from the records of all ranks without communication, so that a checkpoint that is being written when a
rank fails can still be completed.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.storage import WriteResult

from megatron_slm.checkpoint.weights import brief
from megatron_slm.mcore.pickles import restricted_loads
from megatron_slm.runtime.checksums import local_checksum
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import explained_write, write_bytes
from megatron_slm.runtime.signals import end_with_parent

BACKEND, VERSION = "torch_dist", 1
IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_BETWEEN_LOOKS = 0.05  # for the record of another rank


@dataclass(frozen=True)
class WriteRecord:
    """Result of one rank's writing."""

    places: dict[Any, Any] = field(default_factory=dict)  # position in the files, by torch's index of a tensor
    checksums: dict[str, str] = field(default_factory=dict)  # by file name
    error: str = ""  # reason of a failure


class RecordingStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's strategy for ``torch_dist``; its request writes the files of this rank and their record."""

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION)
        self._writer: FileSystemWriterAsync | None = None
        self._metadata: Any = None  # on rank 0

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> AsyncRequest:
        self._writer, self._metadata = writer, save_state_dict_ret[1]
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        arguments = (Path(writer.checkpoint_dir), writer.write_buckets, transforms)
        preload = partial(writer.preload_tensors, writer.write_buckets, True) if writer.write_buckets else None
        return AsyncRequest(partial(write_in_child, dist.get_rank()), arguments, [], preload_fn=preload)

    def finish(self, directory: Path, records: Sequence[WriteRecord]) -> None:
        """Write ``.metadata`` and ``metadata.json`` on rank 0. Not collective."""
        assert self._writer is not None, "called after the save has begun"
        results = [[WriteResult(index, 0, place) for index, place in each.places.items()] for each in records]
        with explained_write(directory, "--save"):
            self._writer.finish(self._metadata, results)
            save_config(CheckpointingConfig(BACKEND, VERSION), str(directory))


def write_now(request: AsyncRequest) -> None:
    """Write the files of this rank in this process.

    Raises:
        ConfigError: a file cannot be written.
    """
    directory, buckets, transforms = request.async_fn_args
    buckets = request.preload_fn() if request.preload_fn is not None else buckets
    record = write_files(dist.get_rank(), directory, buckets, transforms)
    if record.error:
        raise ConfigError(f"{record.error}.")


def write_in_child(rank: int, directory: Path, buckets: Sequence[Any], transforms: list[Any]) -> None:
    """Write the files of a rank in a child process, which ends with its parent and ignores its stop signals."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    write_files(rank, directory, buckets, transforms)


def write_files(rank: int, directory: Path, buckets: Sequence[Any], transforms: list[Any]) -> WriteRecord:
    """Write one file per bucket and the record of this rank, which is also returned.

    If a file cannot be written, those of this rank are removed, so that a full disk has room for the record.
    """
    try:
        places: dict[Any, Any] = {}
        with ThreadPoolExecutor(max(len(buckets), 1)) as threads:
            for written in threads.map(partial(_write_bucket, transforms), buckets):
                places |= written
        record = WriteRecord(places, {name: local_checksum(directory / name, "--save") for _, name, _ in buckets})
    except Exception as error:
        for path, _, _ in buckets:
            with contextlib.suppress(OSError):
                Path(path).unlink()
        record = WriteRecord(error=brief(_file_error(error)))
    with contextlib.suppress(ConfigError):  # rank 0 reports that the record is missing
        write_bytes(_record_path(directory, rank), pickle.dumps(vars(record)), "--save")
    return record


def _file_error(error: BaseException) -> BaseException:
    """Return the file error behind an error: torch's writer reports a wrong position after a failed write."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return error if cause is None else cause


def _write_bucket(transforms: list[Any], bucket: Any) -> dict[Any, Any]:
    """Write and flush the file of one bucket, and return the places of its tensors and objects."""
    results: queue.Queue[Any] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    pending.put(0)
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, pending, True)
    _, written = results.get()
    if isinstance(written, Exception):
        raise written
    return {result.index: result.storage_data for result in written}


def read_records(directory: Path, ranks: int, seconds: float) -> list[WriteRecord]:
    """Return and remove the records of all ranks, waiting up to ``seconds`` for missing ones.

    Raises:
        ConfigError: a rank could not write its files, or left no record.
    """
    limit = time.monotonic() + seconds
    records = [_read_record(directory, rank, limit) for rank in range(ranks)]
    for rank, record in enumerate(records):
        if record.error:
            raise ConfigError(f"{f'rank {rank}: ' if rank else ''}{record.error}.")
    for rank in range(ranks):
        _record_path(directory, rank).unlink()
    return records


def _read_record(directory: Path, rank: int, limit: float) -> WriteRecord:
    path = _record_path(directory, rank)
    while not path.exists():
        if time.monotonic() > limit:
            raise ConfigError(
                f"the process that writes the files of rank {rank} ended without a result, for example because it was "
                "killed for lack of memory, or because --save is not on a disk that all ranks share."
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return WriteRecord(**restricted_loads(path.read_bytes()))


def _record_path(directory: Path, rank: int) -> Path:
    return directory / f".rank-{rank:05d}"
