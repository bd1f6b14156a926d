"""Model settings from a checkpoint instead of the command line: all of them, or those that are not given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_slm.config.constraints import flag_name
from megatron_slm.config.recipe import settings, to_flat_dict, tokenizer_settings, with_settings
from megatron_slm.config.resume import RULES, Rule, differences, show
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import refuse

FLAG = "--use-checkpoint-args"
ALSO = {"max_position_embeddings", "make_vocab_size_divisible_by", "attention_dropout", "hidden_dropout"}

# Returns the configuration with settings from a checkpoint, and a line for the log; takes the names of given settings.
Adopt = Callable[[RunConfig, frozenset[str]], tuple[RunConfig, str]]


def adopt_all(config: RunConfig, saved: RunConfig, given: frozenset[str], directory: Path) -> tuple[RunConfig, str]:
    """Replace the model settings by those of a checkpoint, for --use-checkpoint-args.

    The tokenizer comes from the checkpoint if --tokenizer-type is not given. With --finetune, a given sequence length
    is kept: that of an imported model is the longest that it accepts.

    Args:
        given: names of the settings on the command line and in recipes.

    Returns:
        The configuration and one line for the log.
    """
    names = _model_settings()
    if config.checkpoint.finetune:
        names -= {"seq_length"} & given
    if config.tokenizer.tokenizer_type is None:
        names |= {setting.name for setting, _ in tokenizer_settings()}
    adopted = _differing(config, saved, names)
    return with_settings(config, adopted), f"{FLAG}: from {directory}: {_listed(adopted) or 'no differences'}"


def adopt_missing(
    config: RunConfig, saved: RunConfig, given: frozenset[str], directory: Path, flag: str
) -> tuple[RunConfig, str]:
    """Take the model settings that the command line does not give from a published model.

    The sequence length is that of the run: published models are trained with shorter sequences than they accept.

    Args:
        given: names of the settings on the command line and in recipes.
        flag: flag that names the model, for error messages.

    Raises:
        ConfigError: a given setting contradicts the model; the message has both values of each.
    """
    names = _model_settings() - {"seq_length"} - given
    names |= {"init_method_std", "vocab_size"} - given
    if config.tokenizer.tokenizer_type is None and config.tokenizer.vocab_file is None:
        names |= {setting.name for setting, _ in tokenizer_settings()} - given
    elif saved.tokenizer.tokenizer_type == config.tokenizer.tokenizer_type:
        names |= {"tokenizer_model", "vocab_file", "merge_file"} - given
    adopted = _differing(config, saved, names)
    config = with_settings(config, adopted)
    fixed = _model_settings(also=set()) - {"seq_length"} | {"vocab_size"}
    refuse(
        [
            f"{flag}: {each.flag} {show(each.ours)} contradicts the model in {directory} ({show(each.theirs)}). "
            f"Leave {each.flag} out."
            for each in differences(config, saved)
            if each.name in fixed & given
        ]
    )
    return config, f"{flag}: settings from {directory}: {_listed(adopted) or 'none'}"


def _model_settings(also: set[str] = ALSO) -> set[str]:
    return {name for name, rule in RULES.items() if rule in (Rule.STRUCTURE, Rule.ERROR)} | also


def _differing(config: RunConfig, saved: RunConfig, names: set[str]) -> dict[str, Any]:
    ours, theirs = to_flat_dict(config), to_flat_dict(saved)
    return {name: theirs[name] for name in theirs if name in names and theirs[name] != ours[name]}


def _listed(adopted: dict[str, Any]) -> str:
    flags = {setting.name: flag_name(setting) for _, setting, _ in settings()}
    return ", ".join(f"{flags[name]} {show(value)}" for name, value in adopted.items())
