"""``--use-checkpoint-args``: take the model settings from a checkpoint instead of the flags, as in Megatron-LM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_slm.config.checkpoint_files import MANIFEST_FILE, latest_step, locate_checkpoint, saved_config
from megatron_slm.config.constraints import flag_name
from megatron_slm.config.recipe import settings, to_flat_dict, with_settings
from megatron_slm.config.resume import RULES, Rule
from megatron_slm.config.schema import CheckpointConfig, RunConfig

FLAG = "--use-checkpoint-args"
ALSO = {"max_position_embeddings", "make_vocab_size_divisible_by", "attention_dropout", "hidden_dropout"}


def adopt_checkpoint_args(config: RunConfig) -> tuple[RunConfig, str]:
    """Replace the model settings by those of the checkpoint in --load, else in --pretrained-checkpoint.

    The tokenizer comes from the checkpoint if --tokenizer-type is not given.

    Returns:
        The configuration and one line for the log.

    Raises:
        ConfigError: the checkpoint cannot be read.
    """
    directory = _checkpoint(config.checkpoint)
    if directory is None:
        return config, f"{FLAG}: no checkpoint yet; using the flags"
    saved, current = to_flat_dict(saved_config(directory)), to_flat_dict(config)
    with_tokenizer = config.tokenizer.tokenizer_type is None
    adopted: dict[str, Any] = {}
    changed = []
    for group, setting, _ in settings():
        name, value = setting.name, saved[setting.name]
        is_model = RULES.get(name) in (Rule.STRUCTURE, Rule.ERROR) or name in ALSO
        is_adopted = is_model or (with_tokenizer and (group == "tokenizer" or name == "vocab_size"))
        if is_adopted and value != current[name]:
            adopted[name] = value
            changed.append(f"{flag_name(setting)} {'unset' if value is None else value}")
    note = f"{FLAG}: from {directory}: {', '.join(changed) or 'no differences from the flags'}"
    return with_settings(config, adopted), note


def _checkpoint(flags: CheckpointConfig) -> Path | None:
    for flag, path, step in (
        ("--load", flags.load, flags.ckpt_step),
        ("--pretrained-checkpoint", flags.pretrained_checkpoint, None),
    ):
        if path is None or not Path(path).is_dir():
            continue
        if step is not None or (Path(path) / MANIFEST_FILE).is_file() or latest_step(Path(path)) is not None:
            return locate_checkpoint(path, step, flag)
    return None
