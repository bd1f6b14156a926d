"""Score corpora with a reference model: write a sidecar of reference losses per corpus, for --reference-scores.

Runs in one process or under torchrun, in any parallel layout. Rerun the command to continue an interrupted job.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_slm.cli.layout import add_checkpoint_flags, add_layout_flags, given_layout, start_ranks
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.recipe import from_flat_dict, to_flat_dict
from megatron_slm.config.schema import ReferenceConfig, RunConfig
from megatron_slm.config.schema.training import PARAMS_DTYPES
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, given_tokenizer_settings
from megatron_slm.runtime.launch import read_launch
from megatron_slm.runtime.reporting import run_command

if TYPE_CHECKING:
    from megatron_slm.tokenizers.tokenizer import Tokenizer


REFUSED = {"--score-bytes": "Values have two bytes; leave the flag out."}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown or removed flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    _add_reference_and_corpora(parser.add_argument)
    _add_scoring(parser.add_argument)
    add_layout_flags(parser.add_argument)
    parser.add_argument("--sequence-parallel", action="store_true", help="enable sequence parallelism")
    group = parser.add_argument_group("tokenizer", "default: the tokenizer of the reference model's run")
    add_tokenizer_flags(group)
    return parse_strictly(parser, argv, REFUSED)


def _add_reference_and_corpora(add: Callable[..., argparse.Action]) -> None:
    add(
        "--reference-load",
        type=expand_user,
        required=True,
        help="checkpoint directory of the reference model, or directory of a published model",
    )
    add("--reference-ckpt-step", type=int, help="checkpoint iteration of the reference model; default the newest")
    add(
        "--reference-precision",
        choices=PARAMS_DTYPES,
        help="precision of the reference model; default that of its training run",
    )
    add(
        "--data-path",
        type=expand_user,
        nargs="+",
        required=True,
        help="corpus prefixes, or a blend in the trainer's format, whose weights are ignored",
    )
    add(
        "--reference-scores",
        type=expand_user,
        required=True,
        metavar="NAME",
        help="sidecar name: NAME writes CORPUS.NAME.scores next to each corpus, DIRECTORY/NAME into DIRECTORY",
    )


def _add_scoring(add: Callable[..., argparse.Action]) -> None:
    add(
        "--context",
        choices=("document", "stream", "example"),
        help="context of each token: its document, the preceding token stream across documents, or its example as in "
        "fine-tuning; default example for corpora of tools/preprocess_sft.py, else document",
    )
    add(
        "--seq-length",
        type=int,
        help="tokens of a scoring window; default and maximum the model's --seq-length, for a published model "
        "max_position_embeddings",
    )
    add("--stride", type=int, help="stride between scoring windows in tokens; default half the model's --seq-length")
    add("--entropy", action="store_true", help="also store entropies, which --slm-score reference-entropy requires")
    add_checkpoint_flags(add)
    add("--micro-batch-size", type=int, default=8, help="batch size per data-parallel rank and forward pass")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(lambda: score(parse_arguments(sys.argv[1:] if argv is None else argv)))


def score(arguments: argparse.Namespace) -> None:
    """Score the corpora given on the command line."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.data.datasets import parse_blend
    from megatron_slm.reference.scoring import ScoringJob, reference_config, score_corpora
    from megatron_slm.runtime.collective import on_first_rank
    from megatron_slm.runtime.console import make_console

    launch = read_launch()
    corpora = parse_blend(arguments.data_path)[0]
    job = ScoringJob(
        reference=ReferenceConfig(
            reference_load=[arguments.reference_load],
            reference_ckpt_step=arguments.reference_ckpt_step,
            reference_precision=arguments.reference_precision,
        ),
        corpora=corpora,
        name=arguments.reference_scores,
        parallel=replace(given_layout(arguments), sequence_parallel=arguments.sequence_parallel),
        micro_batch_size=arguments.micro_batch_size,
        context=arguments.context or default_context(corpora),
        stride=arguments.stride,
        seq_length=arguments.seq_length,
        with_entropy=arguments.entropy,
        verify_checksums=arguments.slm_verify_checksums,
    )
    job.check_values()
    groups = start_ranks(job.parallel, arguments)
    tokenizer = find_tokenizer(on_first_rank(lambda: reference_config(job)), arguments)
    on_first_rank(lambda: check_data(job.corpora, tokenizer))
    score_corpora(job, tokenizer, groups, make_console(launch.rank == 0))


def default_context(prefixes: Sequence[str]) -> str:
    """Return the context of fine-tuning for corpora of examples, else the document."""
    from megatron_slm.corpus.loss_masks import ANSWERS, has_mask

    return "example" if all(has_mask(prefix, ANSWERS) for prefix in prefixes) else "document"


def check_data(prefixes: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a corpus is missing, damaged, or of another tokenizer, before the model is loaded."""
    from megatron_slm.corpus.checks import check_corpus, check_tokenizer

    for prefix in prefixes:
        check_corpus(prefix, "--data-path")
        check_tokenizer(prefix, tokenizer, "--data-path")


def find_tokenizer(config: RunConfig, arguments: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer of the reference model's run, with the overrides of the command line."""
    from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

    settings = {**to_flat_dict(config), **given_tokenizer_settings(arguments)}
    return build_run_tokenizer(from_flat_dict(settings, "command line"))
