"""Checkpoints by path, independently of their format: --load, --pretrained-checkpoint and --reference-load.

A format is a class that implements :class:`CheckpointSource`, with static methods ``recognizes(path, step)`` and
``find(path, step, flag)``. To add one, write the class and list it in :data:`FORMATS`. This module and the methods that
do not read weights import no torch, so that settings can be read before a run starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_slm.checkpoint.huggingface.source import HuggingFaceSource
from megatron_slm.checkpoint.megatron_lm.directories import is_distributed
from megatron_slm.checkpoint.megatron_lm.source import MegatronSource
from megatron_slm.checkpoint.native import NativeSource
from megatron_slm.config.checkpoint_files import Manifest
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import UnusableFileError
from megatron_slm.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    import torch

Conflict = tuple[str, str, str]  # the checkpoint's tokenizer, the run's tokenizer, and a remedy


class CheckpointSource(Protocol):
    """Represent one checkpoint in some format. Objects are small, and can be broadcast to other ranks."""

    flag: str  # the flag that names the checkpoint, for error messages
    directory: Path

    @property
    def is_resumable(self) -> bool:
        """Whether the checkpoint continues a run; if not, a run can only start from its weights."""
        ...

    @property
    def defines_settings(self) -> bool:
        """Whether a run takes model settings that its command line does not give from the checkpoint."""
        ...

    def config(self) -> RunConfig:
        """Return the configuration of the saved model; settings that the format does not record have defaults.

        Raises:
            ConfigError: a file is missing or damaged, or the model cannot be represented.
        """
        ...

    def config_over(self, config: RunConfig) -> RunConfig:
        """Return the saved configuration; settings that the checkpoint does not record are those of ``config``.

        Raises:
            ConfigError: as in :meth:`config`.
        """
        ...

    def manifest(self) -> Manifest:
        """Return the position of a resumable checkpoint in its run.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        ...

    def check_fits(self, config: RunConfig) -> None:
        """Validate settings of a run that use the model outside of its limits.

        Raises:
            ConfigError: for example, the sequences are longer than the model's attention window.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the saved model.

        Raises:
            ConfigError: the checkpoint does not name a tokenizer, or its files are missing.
        """
        ...

    def tokenizer_conflict(self, tokenizer: Tokenizer) -> Conflict | None:
        """Return the difference between the checkpoint's tokenizer and ``tokenizer``; None if there is none."""
        ...

    def identity(self) -> str:
        """Return a checksum that identifies the content at every start of a run, from little data."""
        ...

    def fingerprint(self) -> str:
        """Return the fingerprint of all files, which score sidecars record."""
        ...

    def check(self) -> None:
        """Validate that all files are present and complete. Not collective.

        Raises:
            ConfigError: a file is missing or has another size.
        """
        ...

    def verify(self, *, checksums: bool) -> None:
        """Validate the files as :meth:`check` does, their metadata, and on request their content. Collective.

        Raises:
            ConfigError: a file is missing, damaged or contains code; on every rank.
        """
        ...

    def load_weights(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Load the weights into the model chunks of this rank, in any layout. Collective over all ranks.

        Raises:
            ConfigError: the weights are unreadable or do not fit the model; on every rank.
        """
        ...


FORMATS: tuple[Any, ...] = (HuggingFaceSource, MegatronSource, NativeSource)  # the last one explains other paths


def find_source(path: str, step: int | None, flag: str) -> CheckpointSource:
    """Return the checkpoint at ``path``, without validating its files. Not collective.

    Args:
        path: directory of a run, of one of its steps, or of a published model.
        step: requested step, or None for the newest.
        flag: flag that names ``path``, for error messages.

    Raises:
        ConfigError: there is no checkpoint.
    """
    kind = next((kind for kind in FORMATS[:-1] if kind.recognizes(Path(path), step)), FORMATS[-1])
    return kind.find(path, step, flag)


def find_foreign(path: str, step: int | None, flag: str) -> CheckpointSource | None:
    """Return the checkpoint of another program at ``path``; None if there is none. Not collective.

    Raises:
        ConfigError: the format is not supported.
    """
    kind = next((kind for kind in FORMATS[:-1] if kind.recognizes(Path(path), step)), None)
    return None if kind is None else kind.find(path, step, flag)


def steps_to_try(root: Path, source: CheckpointSource) -> tuple[int, ...]:
    """Return the step of ``source``, the newest of another program's run, and those to use if it is damaged, in order.

    Empty if ``root`` is not the directory of a run.
    """
    steps = step_directories(root, source.flag)
    newest = next((step for step, directory in steps.items() if directory == source.directory), -1)
    return tuple(step for step in sorted(steps, reverse=True) if step <= newest and is_distributed(steps[step]))


def holds_only_weights(path: str, step: int | None = None, flag: str = "--load") -> bool:
    """Return whether a run can start from the weights at ``path``, but not resume there. Not collective."""
    source = find_foreign(path, None if is_published(path) else step, flag)
    if source is None:
        return False
    if step is None:
        for older in steps_to_try(Path(path), source)[1:]:
            with suppress(UnusableFileError):
                return not source.is_resumable
            source = find_source(path, older, flag)
    return not source.is_resumable


def is_published(path: str) -> bool:
    """Return whether ``path`` is a published model."""
    return HuggingFaceSource.recognizes(Path(path), None)


def open_source(path: str, step: int | None, flag: str, *, verify: bool = True) -> CheckpointSource:
    """Return a complete checkpoint. Collective over all ranks, which divide the reading.

    Args:
        path: as in :func:`find_source`.
        step: requested step, or None for the newest.
        flag: flag that names ``path``, for error messages.
        verify: compare every file with its checksum, if the format has checksums.

    Raises:
        ConfigError: the checkpoint is missing, incomplete, unreadable or damaged; on every rank.
    """
    from megatron_slm.runtime.collective import on_first_rank

    source = on_first_rank(lambda: find_source(path, step, flag))
    source.verify(checksums=verify)
    return source
