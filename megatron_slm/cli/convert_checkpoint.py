"""Convert checkpoints: import a published model in Hugging Face's format, or export a checkpoint as one.

The tensors are streamed: memory is bounded by the largest tensor. Runs in one process.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from megatron_slm.cli.layout import add_checkpoint_flags
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.output import print_result
from megatron_slm.runtime.reporting import run_command

IMPORT, EXPORT = "import", "export"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag or command, or an invalid value.
    """
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{IMPORT}|{EXPORT}")
    _add_import(commands.add_parser(IMPORT, help="write a published model to --save as a checkpoint of step 0"))
    _add_export(commands.add_parser(EXPORT, help="write a checkpoint to --hf-path as a published model"))
    return parse_strictly(parser, argv, {})


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-path", type=expand_user, required=True, help="directory with config.json, weights and tokenizer"
    )
    parser.add_argument("--save", type=expand_user, required=True, help="new directory for the checkpoint")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", type=expand_user, required=True, help="checkpoint directory of this trainer or of Megatron-LM")
    add("--ckpt-step", type=int, help="checkpoint iteration to export; default the newest")
    add("--hf-path", type=expand_user, required=True, help="new directory for the published model")
    add("--dtype", choices=DTYPES, help="data type of the weights; default that of the checkpoint")
    add("--max-shard-size", type=parse_size, default="5GB", help="largest size of a file, such as 500MB [5GB]")
    add("--tokenizer-model", type=expand_user, help="tokenizer to include; default that of the run")
    add("--chat-template", metavar="FILE", help="Jinja template of conversations; default that of the tokenizer")
    add_checkpoint_flags(add)


def parse_size(text: str) -> int:
    """Return a number of bytes from a text such as 5GB, as in transformers."""
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB|)", text.upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB")
    return int(match[1]) * UNITS[match[2]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(lambda: convert(parse_arguments(sys.argv[1:] if argv is None else argv)))


def convert(arguments: argparse.Namespace) -> None:
    """Convert the checkpoint given on the command line."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core

    if arguments.command == IMPORT:
        from megatron_slm.checkpoint.huggingface.import_model import import_model

        print_result(f"wrote {import_model(arguments.hf_path, arguments.save)}\n")
        return
    from megatron_slm.checkpoint.huggingface.export_model import ExportJob, export_model

    job = ExportJob(
        load=arguments.load,
        hf_path=arguments.hf_path,
        step=arguments.ckpt_step,
        dtype=arguments.dtype,
        shard_bytes=arguments.max_shard_size,
        tokenizer_model=arguments.tokenizer_model,
        chat_template=arguments.chat_template,
        verify=arguments.slm_verify_checksums,
    )
    print_result(f"wrote {export_model(job)}\n")
