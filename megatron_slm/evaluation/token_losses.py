"""Losses of fixed tokens of a corpus under the checkpoints of a run, kept in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.checkpoint.source import find_source
from megatron_slm.config.checkpoint_files import MANIFEST_FILE
from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.corpus.checks import check_corpus, check_tokenizer
from megatron_slm.corpus.index import bin_path
from megatron_slm.corpus.loss_masks import masked_identity
from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.scoring import score_tokens
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.collective import on_first_rank
from megatron_slm.runtime.errors import ConfigError, DivergedError
from megatron_slm.runtime.files import atomic_path
from megatron_slm.tokenizers.base import Tokenizer

Losses = NDArray[np.float32]  # [n], nats


@dataclass(frozen=True)
class TokenSet:
    """Represent the first tokens of a corpus in consecutive windows; a loss has the preceding tokens of its window."""

    ids: NDArray[np.int64]  # [n + 1]; all but the first are scored
    window: int  # scored tokens of a sequence
    identity: str  # of the corpus

    @classmethod
    def read(cls, prefix: str, flag: str, tokenizer: Tokenizer, size: int, window: int) -> TokenSet:
        """Read at most ``size`` + 1 tokens of a corpus.

        Raises:
            ConfigError: the corpus is missing, damaged, made with another tokenizer, or has less than two tokens.
        """
        info = check_corpus(prefix, flag)
        check_tokenizer(prefix, tokenizer, flag)
        if info.tokens < 2:
            raise ConfigError(f"{flag} {prefix} has one token, which has no loss. Give a larger corpus.")
        ids = np.memmap(bin_path(prefix), info.dtype, "r")[: size + 1].astype(np.int64)
        if ids.max() >= tokenizer.vocab_size or ids.min() < 0:
            raise ConfigError(f"{flag} {prefix} has token ids outside of the vocabulary. Recreate the corpus.")
        return cls(ids, window, masked_identity(prefix, None))

    @property
    def labels(self) -> NDArray[np.int64]:
        """Return the ids of the scored tokens, [n]."""
        return self.ids[1:]

    def requests(self) -> list[ScoringRequest]:
        """Return one request per window."""
        starts = range(0, len(self.labels), self.window)
        return [ScoringRequest(self.ids[start : start + self.window + 1].tolist()) for start in starts]


def run_steps(path: str, steps: list[int] | None, flag: str = "--load") -> list[int]:
    """Return the steps of complete checkpoints of a run in ascending order, or those that are asked for.

    Raises:
        ConfigError: a requested checkpoint does not exist, or there are fewer than two.
    """
    directories = step_directories(Path(path), flag)
    found = sorted(step for step, directory in directories.items() if (directory / MANIFEST_FILE).is_file())
    complete = ", ".join(map(str, found)) or "none"
    missing = [step for step in steps or () if step not in found]
    if missing:
        raise ConfigError(
            f"{flag} {path} has no complete checkpoint of step {missing[0]}. The complete steps are {complete}."
        )
    chosen = sorted(set(steps)) if steps else found
    if steps and len(chosen) < 2:
        raise ConfigError(
            f"{flag} {path}: --steps names one checkpoint, and token dynamics need at least two. The complete steps "
            f"are {complete}."
        )
    if len(chosen) < 2:
        raise ConfigError(
            f"{flag} {path}: {len(chosen)} complete checkpoints, and token dynamics need at least two. Give the --save "
            "directory of a run with a small --save-interval and without --keep-last."
        )
    return chosen


def consumed_tokens(path: str, step: int, flag: str = "--load") -> int:
    """Return the tokens that the run of a checkpoint had consumed.

    Raises:
        ConfigError: the checkpoint is incomplete.
    """
    source = find_source(path, step, flag)
    return source.manifest().consumed_samples * source.config().model.seq_length


def check_context(path: str, context: int, window: int, flag: str) -> None:
    """Raise ConfigError if windows are longer than the context of a model."""
    if window > context:
        raise ConfigError(
            f"{flag} {path} has a context of {context} tokens, and the windows have {window}. Use --seq-length "
            f"{context} or less."
        )


def checkpoint_losses(
    path: str,
    step: int | None,
    tokens: TokenSet,
    directory: Path,
    open_checkpoint: Callable[[], InferenceModel],
    *,
    flag: str,
    precision: str | None,
    batch_size: int,
    label: str,
) -> Losses:
    """Return the losses of the tokens under a checkpoint, from a file if it exists. Collective over all ranks.

    Args:
        path: checkpoint directory of a run or of a published model.
        step: its step; None for the newest.
        tokens: the tokens.
        directory: directory of the files.
        open_checkpoint: loads the model. Collective over all ranks.
        flag: flag that names ``path``, for error messages.
        precision: precision of the model; None for that of its run.
        batch_size: sequences per data-parallel rank and forward pass.
        label: name of the checkpoint, for the progress bar and the file.

    Raises:
        ConfigError: the checkpoint is missing or damaged, or its context is shorter than a window.
        DivergedError: a loss is NaN or infinite.
    """
    file = on_first_rank(lambda: directory / f"{label}-{_key(path, step, tokens, flag, precision)}.npy")
    size = len(tokens.labels)
    known = on_first_rank(partial(_read, file, size))
    if known is not None:
        return known
    model = open_checkpoint()
    check_context(path, model.context_length, tokens.window, flag)
    scores = score_tokens(model, tokens.requests(), micro_batch_size=batch_size, label=label)
    losses = -np.concatenate([each.log_probs for each in scores])
    if not np.isfinite(losses).all():
        choice = "other checkpoints with --steps" if flag == "--load" else "another reference model"
        raise DivergedError(f"{flag} {path}: {label} has NaN or infinite losses. Choose {choice}.")
    on_first_rank(partial(_write, file, losses))
    return losses


def _key(path: str, step: int | None, tokens: TokenSet, flag: str, precision: str | None) -> str:
    """Return a checksum of all that the losses depend on."""
    identity = find_source(path, step, flag).identity()
    ids = text_checksum(str((len(tokens.labels), tokens.window, tokens.identity)))
    return text_checksum(f"{identity} {precision} {ids}")[:16]


def _read(file: Path, size: int) -> Losses | None:
    try:
        losses = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_usable = losses.shape == (size,) and losses.dtype == np.float32 and bool(np.isfinite(losses).all())
    return losses if is_usable else None


def _write(file: Path, losses: Losses) -> None:
    with atomic_path(file, "the losses") as partial_file, partial_file.open("wb") as opened:
        np.save(opened, losses)
