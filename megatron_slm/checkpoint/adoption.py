"""Settings that a run takes from the checkpoint it starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.source import FORMATS, CheckpointSource, find_foreign, find_source, steps_to_try
from megatron_slm.config.checkpoint_args import FLAG, adopt_all, adopt_missing
from megatron_slm.config.checkpoint_files import MANIFEST_FILE
from megatron_slm.config.checkpoint_steps import choose_step
from megatron_slm.config.schema import CheckpointConfig, RunConfig
from megatron_slm.mcore.pickle_classes import trust_checkpoints
from megatron_slm.runtime.errors import UnusableFileError


def adopt_settings(config: RunConfig, given: frozenset[str]) -> tuple[RunConfig, str]:
    """Take model settings from the checkpoint in --load, else in --pretrained-checkpoint.

    With --use-checkpoint-args they replace those of the command line. A published model, which has no such flags,
    provides all that ``given`` does not contain.

    Args:
        given: names of the settings on the command line and in recipes.

    Returns:
        The configuration and one line for the log.

    Raises:
        ConfigError: the checkpoint cannot be read, or a given setting contradicts a published model.
    """
    trust_checkpoints(config.checkpoint.trust_checkpoint)
    if config.checkpoint.use_checkpoint_args:
        candidates = _candidates(config.checkpoint)
        if not candidates:
            return config, f"{FLAG}: no checkpoint yet; using the flags"
        source, saved = _first_readable(candidates, config)
        return adopt_all(config, saved, given, source.directory)
    published = _first_source(config.checkpoint, (kind for kind in FORMATS if kind.defines_settings))
    if published is None:
        return config, ""
    published.check_fits(config)
    return adopt_missing(config, published.config(), given, published.directory, published.flag)


def _candidates(flags: CheckpointConfig) -> list[CheckpointSource]:
    """Return the checkpoint that the run starts from, and the earlier steps that it may fall back to."""
    for flag, path, step in _given(flags):
        if step is not None:
            return [find_source(path, step, flag)]
        if (foreign := find_foreign(path, None, flag)) is not None:
            return [foreign, *(find_source(path, each, flag) for each in steps_to_try(Path(path), foreign)[1:])]
        if (Path(path) / MANIFEST_FILE).is_file():
            return [find_source(path, None, flag)]
        if (choice := choose_step(Path(path), flag)) is not None:
            return [find_source(path, each, flag) for each in (choice.step, *choice.alternatives)]
    return []


def _first_readable(candidates: list[CheckpointSource], config: RunConfig) -> tuple[CheckpointSource, RunConfig]:
    """Return the first checkpoint with an undamaged configuration; all steps of a run have the same model."""
    for source in candidates[:-1]:
        with suppress(UnusableFileError):
            return source, source.config_over(config)
    return candidates[-1], candidates[-1].config_over(config)


def _first_source(flags: CheckpointConfig, formats: Iterable[Any]) -> CheckpointSource | None:
    kinds = tuple(formats)
    for flag, path, step in _given(flags):
        for kind in kinds:
            if kind.recognizes(Path(path), step):
                return kind.find(path, step, flag)
    return None


def _given(flags: CheckpointConfig) -> Iterator[tuple[str, str, int | None]]:
    """Yield flag, path and step of the existing directories."""
    for flag, path, step in (
        ("--load", flags.load, flags.ckpt_step),
        ("--pretrained-checkpoint", flags.pretrained_checkpoint, None),
    ):
        if path is not None and Path(path).is_dir():
            yield flag, path, step
