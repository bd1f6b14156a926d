"""Settings that a run takes from the checkpoint it starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.source import FORMATS, CheckpointSource
from megatron_slm.config.checkpoint_args import FLAG, adopt_all, adopt_missing
from megatron_slm.config.schema import CheckpointConfig, RunConfig


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
    if config.checkpoint.use_checkpoint_args:
        source = _first_source(config.checkpoint, FORMATS)
        if source is None:
            return config, f"{FLAG}: no checkpoint yet; using the flags"
        return adopt_all(config, source.config(), given, source.directory)
    source = _first_source(config.checkpoint, (kind for kind in FORMATS if kind.defines_settings))
    if source is None:
        return config, ""
    source.check_fits(config)
    return adopt_missing(config, source.config(), given, source.directory, source.flag)


def _first_source(flags: CheckpointConfig, formats: Iterable[Any]) -> CheckpointSource | None:
    kinds = tuple(formats)
    for flag, path, step in (
        ("--load", flags.load, flags.ckpt_step),
        ("--pretrained-checkpoint", flags.pretrained_checkpoint, None),
    ):
        for kind in kinds if path is not None and Path(path).is_dir() else ():
            if kind.recognizes(Path(path or ""), step):
                return kind.find(path, step, flag)
    return None
