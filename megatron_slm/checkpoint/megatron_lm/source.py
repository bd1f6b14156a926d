"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo 2, as a checkpoint source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.checkpoint.megatron_lm.arguments import settings_of, unsupported_features
from megatron_slm.checkpoint.megatron_lm.common_state import read_backend, read_common_state, read_shards
from megatron_slm.checkpoint.megatron_lm.directories import locate, refuse_other_formats
from megatron_slm.checkpoint.megatron_lm.model_files import read_model_file
from megatron_slm.checkpoint.megatron_lm.tokenizer_files import tokenizer_settings
from megatron_slm.config.checkpoint_files import Manifest, other_step
from megatron_slm.config.checks import derive
from megatron_slm.config.recipe import to_flat_dict, with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.corpus.fingerprints import QUICK_BLOCK, files_fingerprint
from megatron_slm.runtime.errors import ConfigError, UnusableFileError, read_error, refuse
from megatron_slm.tokenizers.base import Tokenizer
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

if TYPE_CHECKING:
    import torch

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")


@dataclass(frozen=True)
class MegatronSource:
    """Implement CheckpointSource for ``torch_dist`` checkpoints without our manifest."""

    flag: str
    directory: Path
    is_release: bool = False  # converted weights without a position in a run
    defines_settings: bool = False

    @staticmethod
    def recognizes(path: Path, step: int | None) -> bool:
        """Return whether the directory contains a checkpoint of another trainer on Megatron-Core."""
        return locate(path, step) is not None

    @staticmethod
    def find(path: str, step: int | None, flag: str) -> MegatronSource:
        """Return the checkpoint of ``step``, or the newest below ``path``.

        Raises:
            ConfigError: the checkpoint has another format than ``torch_dist``.
        """
        location = locate(Path(path), step)
        assert location is not None, "the path was recognized"
        refuse_other_formats(location.directory, flag)
        return MegatronSource(flag, location.directory, location.is_release)

    def __reduce__(self) -> Any:
        return MegatronSource, (self.flag, self.directory, self.is_release)  # without cached properties

    @cached_property
    def common_state(self) -> dict[str, Any]:
        """Return the common state, with placeholders for tensors and Megatron's classes."""
        return read_common_state(self.directory, self.flag)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Return the saved arguments of Megatron-LM, or their equivalents of the other trainers; empty if unknown."""
        model = read_model_file(self.directory, self.flag)
        if model is not None:
            return model
        saved = self.common_state.get("args")
        return {str(name): value for name, value in vars(saved).items()} if hasattr(saved, "__dict__") else {}

    @property
    def is_resumable(self) -> bool:
        """Whether the checkpoint records a position in a run of Megatron-LM."""
        return (
            not self.is_release and "args" in self.common_state and _count(self.common_state, "iteration") is not None
        )

    def manifest(self) -> Manifest:
        """Return the position in the run: iteration and consumed samples, as Megatron-LM resumes them."""
        sizes = {name: _count(self.arguments, f"{name}_model_parallel_size") or 1 for name in ("tensor", "pipeline")}
        layout = {**sizes, "data": _count(self.arguments, "data_parallel_size") or 1}
        step = _count(self.common_state, "iteration") or 0
        return Manifest(step, _count(self.arguments, "consumed_train_samples") or 0, {}, layout, {})

    def recorded(self) -> dict[str, Any]:
        """Return the recorded settings by name.

        Raises:
            ConfigError: the model has features that are not supported.
        """
        found = unsupported_features(self.arguments)
        refuse(
            [
                f"{self.flag}: the model in {self.directory} uses {', '.join(found)}, which is not supported. "
                "Use a checkpoint of a model without it."
            ]
            if found
            else []
        )
        saves_optimizer = {"save_optim": False} if self.arguments.get("no_save_optim") is True else {}
        tokenizer = tokenizer_settings(self.arguments, self.directory)
        return settings_of(self.arguments) | tokenizer | saves_optimizer

    def config(self) -> RunConfig:
        """Return the configuration of the saved model.

        Raises:
            ConfigError: the arguments are missing, incomplete, or unsupported.
        """
        config = derive(with_settings(RunConfig(), self.recorded()))
        missing = [f"--{name.replace('_', '-')}" for name in REQUIRED if to_flat_dict(config)[name] is None]
        if missing:
            raise ConfigError(
                f"{self.flag}: {self.directory} does not record {', '.join(missing)}. Load it into a run with "
                "--pretrained-checkpoint and these flags, and use the checkpoint that the run saves."
            )
        return config

    def config_over(self, config: RunConfig) -> RunConfig:
        """Return ``config`` with the recorded settings, since values that are not recorded cannot differ."""
        return derive(with_settings(config, self.recorded()))

    def check_fits(self, config: RunConfig) -> None:
        """Accept all settings: the model has no limits beyond its sizes."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer in the checkpoint directory, else that of the saved arguments."""
        if self.recorded().get("tokenizer_type") is None:
            raise ConfigError(f"{self.flag}: {self.directory} names no supported tokenizer. Add --tokenizer-type.")
        return build_run_tokenizer(self.config())

    def tokenizer_conflict(self, tokenizer: Tokenizer) -> tuple[str, str, str] | None:
        """Return a conflict if the model has fewer token embeddings than the tokenizer has tokens."""
        rows = self.arguments.get("padded_vocab_size")
        if not isinstance(rows, int) or rows >= tokenizer.vocab_size:
            return None
        return (
            f"a vocabulary of {rows:,} tokens",
            f"{tokenizer.name} of {tokenizer.vocab_size:,} tokens",
            "Use the same tokenizer",
        )

    def identity(self) -> str:
        """Return the fingerprint of blocks of all files."""
        return self._fingerprint(QUICK_BLOCK)

    def fingerprint(self) -> str:
        """Return the fingerprint of larger blocks of all files."""
        return self._fingerprint()

    def _fingerprint(self, *block: int) -> str:
        try:
            return files_fingerprint(sorted(path for path in self.directory.iterdir() if path.is_file()), *block)
        except OSError as error:
            raise read_error(self.flag, error.filename or self.directory, error) from error

    def check(self) -> None:
        """Validate that every shard lies within its file.

        Raises:
            ConfigError: a file is missing, cut or in another format.
        """
        backend = read_backend(self.directory, self.flag)
        if backend != "torch_dist":
            raise ConfigError(
                f"{self.flag}: {self.directory} is in the format {backend}, and torch_dist is required. Load and save "
                "it with Megatron-LM and --ckpt-format torch_dist."
            )
        ends: dict[str, int] = {}
        for shard in read_shards(self.directory, self.flag):
            ends[shard.file] = max(ends.get(shard.file, 0), shard.offset + shard.length)
        for name, end in sorted(ends.items()):
            path = self.directory / name
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UnusableFileError(
                    f"{self.flag}: the checkpoint {self.directory} is damaged: {name} {found}, and at least {end} "
                    f"bytes are required. {other_step(self.flag)}"
                )
        _ = self.common_state

    def verify(self, *, checksums: bool) -> None:
        """Validate files and metadata; the format has no checksums. Collective over all ranks."""
        from megatron_slm.checkpoint.weights import check_metadata
        from megatron_slm.runtime.collective import on_first_rank

        on_first_rank(self.check)
        check_metadata(self.directory, self.flag)

    def load_weights(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Load the weights, saved by any layout. Collective over all ranks."""
        from megatron_slm.checkpoint.weights import load_weights

        load_weights(chunks, self.directory, self.flag)


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
