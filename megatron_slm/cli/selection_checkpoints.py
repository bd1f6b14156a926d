"""Choose the checkpoints whose selection is shown: their policies, scoring windows and tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config.checkpoint_steps import step_directories
from megatron_slm.config.schema import RunConfig
from megatron_slm.config.selection import selects_tokens
from megatron_slm.config.tokenizer_flags import given_tokenizer_settings
from megatron_slm.runtime.errors import ConfigError, UnusableFileError

if TYPE_CHECKING:
    from megatron_slm.checkpoint.source import CheckpointSource
    from megatron_slm.scores.sidecar import ContextRule
    from megatron_slm.tokenizers.tokenizer import Tokenizer

LOAD, REFERENCE = "--load", "--reference-load"


@dataclass(frozen=True)
class Choice:
    """Represent one checkpoint of the training model with its policy."""

    path: str
    step: int | None
    source: CheckpointSource
    label: str
    config: RunConfig
    policy: str
    ratio: float
    uses_ratio: bool


def choose_checkpoints(arguments: argparse.Namespace) -> tuple[list[Choice], ContextRule]:
    """Return the checkpoints of the command line with their policies, and the scoring windows that all models allow.

    Raises:
        ConfigError: a checkpoint is missing or incomplete, or a policy needs a reference model.
    """
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.objective.selection.policy import needs_reference, parse_policy
    from megatron_slm.scores.sidecar import ContextRule

    choices = list(_choices(arguments))
    lengths = {LOAD: min(choice.config.model.seq_length for choice in choices)}
    for choice in choices:
        policy = parse_policy(choice.policy)
        if arguments.reference_load is None and needs_reference(policy):
            raise ConfigError(
                f"--slm-score {choice.policy} of {choice.label} needs a reference model. Give {REFERENCE} DIR, or "
                "--slm-score token-loss."
            )
    if arguments.slm_selection_ratio is not None and not any(choice.uses_ratio for choice in choices):
        raise ConfigError(
            f"--slm-selection-ratio has no effect: every term of --slm-score {choices[0].policy!r} has a ratio. Leave "
            "it out."
        )
    if arguments.reference_load is not None:
        source = find_source(arguments.reference_load, arguments.reference_ckpt_step, REFERENCE)
        source.check()
        lengths[REFERENCE] = source.config().model.seq_length
    longest = min(lengths.values())
    window = arguments.seq_length or longest
    if window > longest:
        flag = min(lengths, key=lambda name: lengths[name])
        raise ConfigError(f"--seq-length is {window}, and must be at most {longest}, that of the model of {flag}.")
    stride = arguments.stride or max(1, window // 2)
    if stride > window:
        raise ConfigError(f"--stride is {stride}, and must be at most {window}, the tokens of a window.")
    return choices, ContextRule("document", window, stride)


def _choices(arguments: argparse.Namespace) -> Iterator[Choice]:
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.runtime.console import notice

    found: dict[Path, Choice] = {}
    for path, step, is_requested in _given_steps(arguments):
        try:
            source = find_source(path, step, LOAD)
            source.check()
        except UnusableFileError as error:
            if is_requested:
                raise
            notice(f"step {step} is left out: {error}")
            continue
        found.setdefault(source.directory.resolve(), _choice(arguments, source, path, step))
    if not found:
        raise ConfigError(f"{LOAD} {' '.join(arguments.load)}: no step is complete. Choose another directory.")
    labels = [choice.label for choice in found.values()]
    for choice in found.values():
        is_unique = labels.count(choice.label) == 1
        yield choice if is_unique else replace(choice, label=f"{choice.source.directory} ({choice.label})")


def _given_steps(arguments: argparse.Namespace) -> Iterator[tuple[str, int | None, bool]]:
    """Yield (directory, step, whether it is requested) of --load; --all-steps requests no step in particular."""
    for text in arguments.load:
        path, colon, number = text.rpartition(":")
        if not colon or not number.isascii() or not number.isdigit() or Path(text).exists():
            path, number = text, arguments.ckpt_step
        if arguments.all_steps and not isinstance(number, str) and (steps := step_directories(Path(path), LOAD)):
            yield from ((path, step, False) for step in steps)
        else:
            yield path, None if number is None else int(number), True


def _choice(arguments: argparse.Namespace, source: CheckpointSource, path: str, step: int | None) -> Choice:
    from megatron_slm.objective.selection.policy import has_own_ratios, needs_reference, parse_policy
    from megatron_slm.runtime.console import notice
    from megatron_slm.training.curriculum import selection_ratio

    config = source.config()
    objective = config.objective
    number, consumed = None, 0
    if source.is_resumable:
        manifest = source.manifest()
        number, consumed = manifest.step, manifest.consumed_samples * config.model.seq_length
    label = run_name(source.directory) + ("" if number is None else f" step {number:,}")
    ratio = arguments.slm_selection_ratio or selection_ratio(objective, number or 0, consumed)
    policy = arguments.slm_score or objective.slm_score
    parsed = parse_policy(policy)
    uses_ratio = not has_own_ratios(parsed)
    chosen = f" with k = {ratio:g}" if uses_ratio else ""
    if not selects_tokens(config) and arguments.slm_selection_ratio is None:
        notice(f"{label} was trained without selection; the selection is shown for {policy}{chosen}")
    adapts = objective.slm_ratio_gain or objective.slm_corpus_ratios
    if adapts and uses_ratio and arguments.slm_selection_ratio is None:
        notice(f"the ratio of {label} adapts or differs between corpora; the selection is shown{chosen}")
    count = len(config.reference.references)
    if count > 1 and needs_reference(parsed) and arguments.reference_load is not None:
        notice(f"{label} used {count} reference models; the selection is shown with that of {REFERENCE}")
    return Choice(path, step, source, label, config, policy, ratio, uses_ratio)


def run_name(directory: Path) -> str:
    """Return the name of the run or the published model in a checkpoint directory."""
    directory = directory.resolve()
    return directory.parent.name if directory.name.startswith("iter_") else directory.name


def shared_tokenizer(choices: Sequence[Choice], arguments: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer of the first checkpoint.

    Raises:
        ConfigError: it cannot be built, or another model was trained with another tokenizer.
    """
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.inference.model import checkpoint_tokenizer

    first = choices[0]
    tokenizer = checkpoint_tokenizer(first.source, first.config, given_tokenizer_settings(arguments))
    named = [(choice.label, choice.source) for choice in choices[1:]]
    if arguments.reference_load is not None:
        source = find_source(arguments.reference_load, arguments.reference_ckpt_step, REFERENCE)
        named.append(("the reference model", source))
    for name, source in named:
        if (conflict := source.tokenizer_conflict(tokenizer)) is not None:
            theirs, ours, remedy = conflict
            raise ConfigError(
                f"{source.flag}: {name} was trained with {theirs}, and {first.label} has {ours}. {remedy} for all "
                "models."
            )
    return tokenizer
