"""Published models in Hugging Face's format, as a checkpoint source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.checkpoint.huggingface.config_file import PublishedConfig
from megatron_slm.checkpoint.huggingface.files import (
    CONFIG_FILE,
    MERGES,
    SENTENCEPIECE_MODEL,
    TOKENIZER_JSON,
    VOCABULARY,
)
from megatron_slm.checkpoint.huggingface.registry import find_family
from megatron_slm.config.checkpoint_files import MANIFEST_FILE, TRACKER, Manifest, step_flag
from megatron_slm.config.checks import derive, value_violations
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.tokenizers.base import Tokenizer
from megatron_slm.tokenizers.identity import identity_conflict, tokenizer_identity
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HuggingFaceSource:
    """Implement CheckpointSource for a directory with a ``config.json`` and weights."""

    flag: str
    directory: Path
    is_resumable: bool = False
    defines_settings: bool = True

    @staticmethod
    def recognizes(path: Path, step: int | None) -> bool:
        """Return whether the directory contains a published model, and no checkpoint of a training run."""
        is_run = (path / TRACKER).exists() or (path / MANIFEST_FILE).exists()
        return (path / CONFIG_FILE).is_file() and not is_run

    @staticmethod
    def find(path: str, step: int | None, flag: str) -> HuggingFaceSource:
        """Return the model in a directory.

        Raises:
            ConfigError: a step is requested, which published models do not have.
        """
        if step is not None:
            raise ConfigError(
                f"{flag} {path} is a published model, which has no step {step}. Leave {step_flag(flag)} out."
            )
        return HuggingFaceSource(flag, Path(path))

    def published(self) -> PublishedConfig:
        """Return the contents of ``config.json``."""
        return PublishedConfig.read(self.directory, self.flag)

    def config(self) -> RunConfig:
        """Return the model's settings, precision and tokenizer; the sequence length is its longest."""
        published = self.published()
        settings = find_family(published).read_settings(published)
        dtype = published.values.get("dtype", published.values.get("torch_dtype"))
        settings |= {"bf16": dtype == "bfloat16", **tokenizer_settings(self.directory.absolute())}
        config = with_settings(RunConfig(), settings)
        refuse([f"{self.flag}: {published.path} implies invalid settings: {text}" for text in value_violations(config)])
        return derive(config)

    def config_over(self, config: RunConfig) -> RunConfig:
        """Return the configuration of the model, which defines all settings of its structure."""
        return self.config()

    def manifest(self) -> Manifest:
        """Raise AssertionError: no run resumes from a published model."""
        raise AssertionError("a published model is not resumable")

    def check_fits(self, config: RunConfig) -> None:
        """Validate the sequence length of a run, within which a sliding window must have no effect."""
        published, length = self.published(), config.model.seq_length or 0
        limit = self.config().model.max_position_embeddings
        if limit < length and limit < published.integer("max_position_embeddings", limit):
            raise ConfigError(
                f"{self.flag}: {published.path} has a sliding_window of {limit} tokens, and --seq-length is {length}. "
                f"Sliding-window attention is not supported: use --seq-length {limit} or less."
            )

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer in the directory."""
        config = self.config()
        if config.tokenizer.tokenizer_type is None:
            raise ConfigError(f"{self.flag}: {self.directory} contains no tokenizer. Specify --tokenizer-type.")
        return build_run_tokenizer(config)

    def tokenizer_conflict(self, tokenizer: Tokenizer) -> tuple[str, str, str] | None:
        """Return the difference from the tokenizer in the directory, whose files may have several formats.

        Without a readable tokenizer, only the sizes are compared.
        """
        conflicts: list[tuple[str, str, str] | None] = []
        for settings in _tokenizers(self.directory):
            try:
                published = build_run_tokenizer(with_settings(self.config(), settings))
            except ConfigError as error:
                notice(
                    f"{self.flag}: the tokenizer in {self.directory} is not compared with {tokenizer.source}: {error}"
                )
            else:
                conflicts.append(identity_conflict(tokenizer_identity(published), tokenizer))
        return (None if None in conflicts else conflicts[-1]) if conflicts else self._size_conflict(tokenizer)

    def _size_conflict(self, tokenizer: Tokenizer) -> tuple[str, str, str] | None:
        rows = self.config().model.vocab_size or 0
        if tokenizer.vocab_size <= rows:
            return None
        ours = f"{tokenizer.name} of {tokenizer.vocab_size:,} tokens"
        return f"a vocabulary of {rows:,} tokens", ours, "Use the same tokenizer"

    def identity(self) -> str:
        """Return a checksum of the configuration and of blocks of the weights."""
        return self._fingerprint(quick=True)

    def fingerprint(self) -> str:
        """Return the fingerprint of the configuration and the weights."""
        return self._fingerprint(quick=False)

    def _fingerprint(self, *, quick: bool) -> str:
        from megatron_slm.checkpoint.huggingface.tensors import weight_files
        from megatron_slm.corpus.fingerprints import BLOCK, QUICK_BLOCK, files_fingerprint

        paths = [self.directory / CONFIG_FILE, *weight_files(self.directory, self.flag)]
        return files_fingerprint(paths, QUICK_BLOCK if quick else BLOCK)

    def check(self) -> None:
        """Validate the configuration, and the names and sizes of all tensors."""
        from megatron_slm.checkpoint.huggingface.load import check_tensors

        check_tensors(self)

    def verify(self, *, checksums: bool) -> None:
        """Validate as :meth:`check` does, since the format has no checksums. Collective over all ranks."""
        from megatron_slm.runtime.collective import on_first_rank

        on_first_rank(self.check)

    def load_weights(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Load this rank's part of the weights, one published tensor at a time. Collective over all ranks."""
        from megatron_slm.checkpoint.huggingface.load import load_weights
        from megatron_slm.runtime.collective import on_every_rank

        on_every_rank(lambda: load_weights(self, chunks))


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of the directory's tokenizer; empty if it contains none."""
    return next(iter(_tokenizers(directory)), {})


def _tokenizers(directory: Path) -> list[dict[str, Any]]:
    """Return the settings for each format of the tokenizer, in order of preference."""
    vocabulary = {"vocab_file": str(directory / VOCABULARY), "merge_file": str(directory / MERGES)}
    formats = (
        (TOKENIZER_JSON, {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(directory)}),
        (
            SENTENCEPIECE_MODEL,
            {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(directory / SENTENCEPIECE_MODEL)},
        ),
        (MERGES, {"tokenizer_type": "GPT2BPETokenizer", **vocabulary}),
    )
    return [settings for name, settings in formats if (directory / name).is_file()]
