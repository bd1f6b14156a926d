"""Analyze how the losses of fixed validation tokens move over the checkpoints of a run (Rho-1, section 2.1).

Each token is one of four classes by a straight line through its losses: H→L, L→L, H→H, L→H. With a reference model, the
tokens that each checkpoint would select are analyzed as well. Runs in one process or under torchrun, in any parallel
layout. The losses of each checkpoint are kept in OUTPUT/losses, so that a repeated or interrupted command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.cli.layout import add_checkpoint_flags, add_layout_flags, given_layout, start_ranks
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.schema.training import PARAMS_DTYPES
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.reporting import run_command

if TYPE_CHECKING:
    from megatron_slm.analysis.dynamics_report import Trajectories
    from megatron_slm.evaluation.token_losses import Losses, TokenSet
    from megatron_slm.runtime.groups import Groups
    from megatron_slm.tokenizers.base import Tokenizer

RATIO = 0.6  # selected share by default
RESULT, PLOT, LOSSES = "dynamics.json", "dynamics.png", "losses"  # in the output directory


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or a missing or invalid value.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load", type=expand_user, required=True, metavar="DIR", help="--save directory of a run with checkpoints")
    add("--data-path", type=expand_user, required=True, metavar="PREFIX", help="prefix of the validation corpus")
    add("--output", type=expand_user, required=True, metavar="DIR", help="directory of the results")
    add("--reference-load", type=expand_user, metavar="DIR", help="checkpoint directory of the reference model")
    add("--reference-ckpt-step", type=int, help="checkpoint iteration of the reference model; default the newest")
    add("--steps", type=int, nargs="+", metavar="N", help="checkpoints to analyze; default all complete ones")
    add("--tokens", type=int, default=320_000, help="number of tokens, from the beginning of the corpus [320000]")
    add("--seq-length", type=int, help="tokens of a window; default that of the run")
    add("--slm-selection-ratio", type=float, help=f"fraction of the tokens to select by excess loss [{RATIO}]")
    add("--batch-size", type=int, default=8, help="sequences per data-parallel rank and forward pass [8]")
    add("--precision", choices=PARAMS_DTYPES, help="precision of the models; default that of their training runs")
    add_layout_flags(add)
    add_checkpoint_flags(add)
    arguments = parse_strictly(parser, argv, {})
    least = {"tokens": arguments.tokens, "batch-size": arguments.batch_size, "seq-length": arguments.seq_length}
    problems = [f"--{n} is {v}, and must be above 0." for n, v in least.items() if v is not None and v < 1]
    ratio = arguments.slm_selection_ratio
    if ratio is not None and not 0 < ratio <= 1:
        problems.append(f"--slm-selection-ratio is {ratio}, and must be in (0, 1].")
    for name, value in (("reference-ckpt-step", arguments.reference_ckpt_step), ("slm-selection-ratio", ratio)):
        if value is not None and arguments.reference_load is None:
            problems.append(f"--{name} has no effect without --reference-load. Add it, or leave it out.")
    refuse(problems)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(lambda: run(parse_arguments(sys.argv[1:] if argv is None else argv)))


def run(arguments: argparse.Namespace) -> None:
    """Analyze the run of the command line. Collective over all ranks."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.analysis.dynamics_report import Dynamics
    from megatron_slm.runtime.collective import on_first_rank

    parallel = given_layout(arguments)
    groups = start_ranks(parallel, arguments)
    steps = on_first_rank(lambda: _complete_steps(arguments))
    tokens, categories = on_first_rank(lambda: _read_tokens(arguments, steps))
    output = on_first_rank(lambda: _create_output(Path(arguments.output)))
    trajectories = _collect(arguments, groups, steps, tokens, categories, output / LOSSES)
    settings = {name: getattr(arguments, name) for name in ("load", "data_path", "reference_load", "precision")}
    settings |= {"tokens": len(tokens.labels), "seq_length": tokens.window}
    on_first_rank(lambda: _report(Dynamics.analyze(trajectories), settings, output, groups))


def _complete_steps(arguments: argparse.Namespace) -> list[int]:
    """Return the steps to analyze.

    Raises:
        ConfigError: there are too few checkpoints, or one is incomplete.
    """
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.evaluation.token_losses import run_steps

    steps = run_steps(arguments.load, arguments.steps)
    for step in steps:
        find_source(arguments.load, step, "--load").check()
    return steps


def _create_output(output: Path) -> Path:
    """Create the output directory, and return it.

    Raises:
        ConfigError: it contains files of another program, or cannot be written.
    """
    from megatron_slm.runtime.files import check_output_file, explained_write

    with explained_write(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
    check_output_file(output / RESULT, "--output", is_ours=_is_ours)
    if (output / PLOT).exists() and not (output / RESULT).exists():
        raise ConfigError(f"--output {output} has a {PLOT}, but no {RESULT}. Choose another directory.")
    with explained_write(output, "--output"):
        (output / LOSSES).mkdir(exist_ok=True)
    return output


def _collect(
    arguments: argparse.Namespace,
    groups: Groups,
    steps: list[int],
    tokens: TokenSet,
    categories: Any,
    directory: Path,
) -> Trajectories:
    """Return the losses of all checkpoints. Collective over all ranks."""
    import numpy as np

    from megatron_slm.analysis.dynamics_report import Trajectories
    from megatron_slm.evaluation.token_losses import consumed_tokens
    from megatron_slm.runtime.collective import on_first_rank

    score = partial(_score, arguments, groups, tokens, directory)
    losses = [score(arguments.load, step, "--load", f"step-{step:07d}") for step in steps]
    reference = None
    if arguments.reference_load:
        step = arguments.reference_ckpt_step
        reference = score(arguments.reference_load, step, "--reference-load", "reference").astype(np.float64)
    consumed = on_first_rank(lambda: [consumed_tokens(arguments.load, step) for step in steps])
    return Trajectories(
        steps=steps,
        tokens=np.array(consumed, np.float64),
        losses=np.stack(losses).astype(np.float64),
        categories=categories,
        reference=reference,
        ratio=arguments.slm_selection_ratio or RATIO,
    )


def _read_tokens(arguments: argparse.Namespace, steps: list[int]) -> tuple[TokenSet, Any]:
    """Return the validation tokens and their categories, [n] int64.

    Raises:
        ConfigError: the corpus or the reference model does not match the run, or a model has a shorter context.
    """
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.evaluation.token_losses import TokenSet, check_context

    source = find_source(arguments.load, steps[-1], "--load")
    tokenizer, model = source.tokenizer(), source.config().model
    window = arguments.seq_length or model.seq_length
    check_context(arguments.load, model.max_position_embeddings, window, "--load")
    if arguments.reference_load:
        reference = find_source(arguments.reference_load, arguments.reference_ckpt_step, "--reference-load")
        reference.check()
        context = reference.config().model.max_position_embeddings
        check_context(arguments.reference_load, context, window, "--reference-load")
        if (conflict := reference.tokenizer_conflict(tokenizer)) is not None:
            theirs, ours, _ = conflict
            raise ConfigError(
                f"--reference-load {arguments.reference_load}: the reference model was trained with {theirs}, and the "
                f"run with {ours}. Give a reference model with the same tokenizer."
            )
    tokens = TokenSet.read(arguments.data_path, "--data-path", tokenizer, arguments.tokens, window)
    return tokens, _categories(tokens, tokenizer)


def _score(
    arguments: argparse.Namespace,
    groups: Groups,
    tokens: TokenSet,
    directory: Path,
    path: str,
    step: int | None,
    flag: str,
    label: str,
) -> Losses:
    """Return the losses of one checkpoint. Collective over all ranks."""
    from megatron_slm.evaluation.token_losses import checkpoint_losses
    from megatron_slm.inference.model import open_model

    return checkpoint_losses(
        path,
        step,
        tokens,
        directory,
        partial(
            open_model,
            path,
            given_layout(arguments),
            groups,
            step=step,
            flag=flag,
            precision=arguments.precision,
            verify=arguments.slm_verify_checksums,
        ),
        flag=flag,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        label=label,
    )


def _categories(tokens: TokenSet, tokenizer: Tokenizer) -> Any:
    """Return the category of each token, [n] int64."""
    import numpy as np

    from megatron_slm.analysis.token_categories import CATEGORIES, categorize

    text_of = _token_texts(tokenizer)
    special = {tokenizer.eod, *tokenizer.special_ids}
    ids, places = np.unique(tokens.labels, return_inverse=True)
    texts = ["" if token in special else text_of(token) for token in ids.tolist()]  # their texts look like code
    return np.array([CATEGORIES.index(categorize(text)) for text in texts])[places]


def _token_texts(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function from a token to its text after other text, since decoding strips a leading space."""
    before = list(tokenizer.encode("0"))
    prefix = tokenizer.decode(before)
    return lambda token: tokenizer.decode([*before, token]).removeprefix(prefix)


def _report(dynamics: Any, settings: dict[str, Any], output: Path, groups: Groups) -> None:
    """Print the tables, and write the JSON file and the plots."""
    from megatron_slm.analysis.dynamics_report import KIND, LEAST_FOR_SIGMOIDS, category_table, class_table, plot
    from megatron_slm.runtime.console import make_console
    from megatron_slm.runtime.files import write_text

    record = {"kind": KIND, "settings": settings, **dynamics.record()}
    write_text(output / RESULT, json.dumps(record, indent=1, allow_nan=False) + "\n", "--output", is_ours=_is_ours)
    plot(dynamics, output / PLOT, "--output")
    console = make_console(groups.is_logging_rank)
    console.print(class_table(dynamics))
    fits = record["fits"]
    console.print(f"straight lines explain {fits['line']['explained']:.1%} of the variance of the losses over training")
    if "sigmoid" in fits:
        sigmoid = fits["sigmoid"]
        console.print(
            f"sigmoids explain {sigmoid['explained']:.1%}, and have a lower AICc for "
            f"{sigmoid['share_with_lower_aicc']:.1%} of the tokens"
        )
    else:
        console.print(f"no sigmoids are fitted: they need {LEAST_FOR_SIGMOIDS} checkpoints or more, all after step 0")
    if dynamics.selections:
        console.print(category_table(dynamics))
    console.print(f"wrote {output / RESULT} and {output / PLOT}", markup=False)


def _is_ours(path: Path) -> bool:
    from megatron_slm.analysis.dynamics_report import KIND
    from megatron_slm.runtime.files import is_json_of

    return is_json_of(path, KIND)
