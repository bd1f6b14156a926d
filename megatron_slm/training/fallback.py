"""Verify the initial checkpoint of a run, and fall back to the newest intact one of its directory.

A resumed run repeats the steps since the checkpoint that it falls back to. A reference model has no fallback: another
step of it would select other tokens, which no later step would correct.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_slm.checkpoint.source import CheckpointSource, open_source
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.collective import is_first_rank, on_first_rank
from megatron_slm.runtime.console import warn
from megatron_slm.runtime.errors import UnusableFileError
from megatron_slm.training.data_order import DataRecord
from megatron_slm.training.start import Checkpoint, Start


def verified_start(start: Start, config: RunConfig) -> Start:
    """Return the start from an intact checkpoint. Collective over all ranks.

    Raises:
        ConfigError: the checkpoint is damaged or incomplete, and has no intact alternative; on every rank.
    """
    checkpoint = start.checkpoint
    if checkpoint is None:
        return start
    failures: list[tuple[Checkpoint, UnusableFileError]] = []
    for candidate in (checkpoint, *(replace(checkpoint, step=step) for step in checkpoint.alternatives)):
        try:
            _verify(candidate, config)
        except UnusableFileError as error:
            failures.append((candidate, error))
            _report(error, is_last=len(failures) > len(checkpoint.alternatives))
        else:
            return _with_fallback(start, candidate, [failed for failed, _ in failures])
    first = failures[0][1]
    if len(failures) == 1:
        raise first
    tried = ", ".join(str(failed.step) for failed, _ in failures)
    raise UnusableFileError(f"{first} No step of {checkpoint.path} is intact (tried {tried}).")


def _verify(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Raise UnusableFileError if a file of the checkpoint is damaged. Collective over all ranks."""
    verify = config.checkpoint.slm_verify_checksums
    source = open_source(checkpoint.path, checkpoint.step, checkpoint.flag, verify=verify)
    on_first_rank(lambda: _read_records(source, config) if source.is_resumable else None)


def _read_records(source: CheckpointSource, config: RunConfig) -> None:
    source.manifest()
    source.config_over(config)
    DataRecord.read(source.directory)


def _report(error: UnusableFileError, *, is_last: bool) -> None:
    if is_first_rank() and not is_last:
        warn(f"{error} Trying the next older step.")


def _with_fallback(start: Start, used: Checkpoint, damaged: list[Checkpoint]) -> Start:
    """Return the start from ``used``; its description names the damaged steps."""
    if not damaged:
        return start
    steps = tuple(checkpoint.step for checkpoint in damaged if checkpoint.step is not None)
    shown = ", ".join(map(str, steps))
    reason = f"step {shown} is damaged" if len(steps) == 1 else f"steps {shown} are damaged"
    note = f"{reason}; this is the newest intact checkpoint"
    if is_first_rank():
        warn(f"{used.flag} {used.path}: {reason}. Using step {used.step}, the newest intact checkpoint.")
    return replace(start, checkpoint=used, damaged=steps, note=note)
