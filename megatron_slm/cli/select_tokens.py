"""Select answer tokens of fine-tuning corpora by one threshold, and write a loss mask for --objective sft.

Of all corpora together, the answer tokens with the highest excess loss are selected: the loss of the base model minus
that of the reference model. Both are score sidecars of tools/score_corpus.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, config_from_tokenizer_flags
from megatron_slm.data.blends import parse_blend
from megatron_slm.finetune.selection import SelectionJob, select_over_corpora
from megatron_slm.runtime.output import print_summary
from megatron_slm.runtime.reporting import run_tool
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or an invalid value.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--data-path",
        type=expand_user,
        nargs="+",
        required=True,
        help="corpus prefixes, or a blend in the trainer's format, whose weights are ignored",
    )
    add("--base-scores", type=expand_user, required=True, metavar="NAME", help="sidecars of the base model's losses")
    add(
        "--reference-scores",
        type=expand_user,
        required=True,
        metavar="NAME",
        help="sidecars of the reference model's losses",
    )
    add("--slm-selection-ratio", type=float, default=0.6, help="fraction of the answer tokens to select [0.6]")
    add("--slm-loss-mask", required=True, metavar="NAME", help="name of the masks CORPUS.NAME.mask to write")
    add(
        "--slm-verify-checksums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="verify the checksums of masks and sidecars before use",
    )
    add_tokenizer_flags(parser, required=True)
    return parse_strictly(parser, argv, {})


def main() -> int:
    """Run the command line and return the exit code."""
    return run_tool(lambda: _select(parse_arguments(sys.argv[1:])))


def _select(arguments: argparse.Namespace) -> None:
    job = SelectionJob(
        corpora=parse_blend(arguments.data_path)[0],
        base_scores=arguments.base_scores,
        reference_scores=arguments.reference_scores,
        ratio=arguments.slm_selection_ratio,
        name=arguments.slm_loss_mask,
        verify_checksums=arguments.slm_verify_checksums,
    )
    files = TokenizerFiles.from_config(config_from_tokenizer_flags(arguments))
    threshold, found = select_over_corpora(job, build_tokenizer(arguments.tokenizer_type, files))
    for each in found:
        share = each.selected / max(each.answers, 1)
        print_summary(
            f"{each.prefix}.{job.name}.mask: {each.selected:,} of {each.answers:,} answer tokens ({share:.1%})"
        )
    print_summary(f"threshold: excess loss {threshold:.4f} nats")
