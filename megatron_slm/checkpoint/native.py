"""Checkpoints that this trainer wrote, as a checkpoint source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config.checkpoint_files import (
    MANIFEST_FILE,
    Manifest,
    check_sizes,
    latest_step,
    read_manifest,
    saved_config,
)
from megatron_slm.config.checkpoint_steps import locate_checkpoint
from megatron_slm.config.paths import TOKENIZER_DIRECTORY
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import read_error
from megatron_slm.tokenizers.base import Tokenizer
from megatron_slm.tokenizers.identity import identity_conflict
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NativeSource:
    """Implement CheckpointSource for Megatron-Core's distributed format with our manifest and configuration."""

    flag: str
    directory: Path
    is_resumable: bool = True
    defines_settings: bool = False

    @staticmethod
    def recognizes(path: Path, step: int | None) -> bool:
        """Return whether the directory contains a checkpoint."""
        return step is not None or (path / MANIFEST_FILE).is_file() or latest_step(path) is not None

    @staticmethod
    def find(path: str, step: int | None, flag: str) -> NativeSource:
        """Return the checkpoint of ``step``, or the newest below ``path``.

        Raises:
            ConfigError: there is no checkpoint.
        """
        return NativeSource(flag, locate_checkpoint(path, step, flag))

    def config(self) -> RunConfig:
        """Return the configuration of the run that wrote the checkpoint; a cut file would have defaults."""
        check_sizes(self.directory, read_manifest(self.directory, self.flag), self.flag)
        return _with_present_tokenizer(saved_config(self.directory), self.directory)

    def config_over(self, config: RunConfig) -> RunConfig:
        """Return the configuration of the run, which records all settings."""
        return self.config()

    def manifest(self) -> Manifest:
        """Return the manifest."""
        return read_manifest(self.directory, self.flag)

    def check_fits(self, config: RunConfig) -> None:
        """Accept every run: differences of settings are compared by :mod:`megatron_slm.config.resume`."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run that wrote the checkpoint."""
        return build_run_tokenizer(self.config())

    def tokenizer_conflict(self, tokenizer: Tokenizer) -> tuple[str, str, str] | None:
        """Return the difference between the recorded tokenizer and ``tokenizer``."""
        return identity_conflict(read_manifest(self.directory, self.flag).tokenizer, tokenizer)

    def identity(self) -> str:
        """Return the checksum of the manifest, which contains the checksums of all files."""
        from megatron_slm.runtime.checksums import text_checksum

        path = self.directory / MANIFEST_FILE
        try:
            return text_checksum(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise read_error(self.flag, path, error if isinstance(error, OSError) else str(error)) from error

    def fingerprint(self) -> str:
        """Return the fingerprint of the manifest and the files listed in it."""
        from megatron_slm.checkpoint.weights import checkpoint_fingerprint

        return checkpoint_fingerprint(self.directory, self.flag)

    def check(self) -> None:
        """Validate the manifest and the file sizes."""
        from megatron_slm.checkpoint.weights import check_complete

        check_complete(self.directory, self.flag)

    def verify(self, *, checksums: bool) -> None:
        """Validate manifest, sizes and metadata, and on request the checksums. Collective over all ranks."""
        from megatron_slm.checkpoint.weights import check_metadata, verify_checkpoint

        verify_checkpoint(self.directory, self.flag, checksums=checksums)
        check_metadata(self.directory, self.flag)

    def load_weights(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Load the weights, saved by any layout. Collective over all ranks."""
        from megatron_slm.checkpoint.weights import load_weights

        load_weights(chunks, self.directory, self.flag)


def _with_present_tokenizer(config: RunConfig, directory: Path) -> RunConfig:
    """Use the tokenizer beside the checkpoint of an imported model if it was moved together with the checkpoint."""
    recorded = config.tokenizer.tokenizer_model
    if recorded is None or Path(recorded).exists():
        return config
    beside = directory.absolute().parent / TOKENIZER_DIRECTORY
    moved = beside if Path(recorded).name == TOKENIZER_DIRECTORY else beside / Path(recorded).name
    return with_settings(config, {"tokenizer_model": str(moved)}) if moved.exists() else config
