"""Tokenizer flags of the command-line tools, with the names, defaults and help texts of the trainer."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from megatron_slm.config.checks import value_violations
from megatron_slm.config.constraints import flag_name
from megatron_slm.config.recipe import from_flat_dict, tokenizer_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import refuse


def add_tokenizer_flags(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    """Add the tokenizer flags to a tool's parser; flags that are not given set no attribute.

    Args:
        required: whether --tokenizer-type must be given.
    """
    for setting, kind in tokenizer_settings():
        shown = "" if setting.default is None else f" [{setting.default}]"
        parser.add_argument(
            flag_name(setting),
            default=argparse.SUPPRESS,
            type=int if int in (kind, *get_args(kind)) else str,
            metavar="|".join(setting.metadata["choices"]) or "VALUE",
            required=required and setting.name == "tokenizer_type",
            help=setting.metadata["help"] + shown,
        )


def given_tokenizer_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the tokenizer settings given on the command line, by name."""
    names = [setting.name for setting, _ in tokenizer_settings()]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def config_from_tokenizer_flags(arguments: argparse.Namespace) -> RunConfig:
    """Return a configuration with the tokenizer settings of the command line.

    Raises:
        ConfigError: a value violates its constraints.
    """
    config = from_flat_dict(given_tokenizer_settings(arguments), "command line")
    refuse(value_violations(config))
    return config
