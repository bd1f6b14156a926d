"""Generate text with a trained model: prompts from the command line or JSON lines, text to the terminal or JSON lines.

Runs in one process or under torchrun, in any parallel layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_slm.cli.layout import add_checkpoint_flags, add_layout_flags, add_model_flags, given_layout, start_ranks
from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.config.tokenizer_flags import add_tokenizer_flags, given_tokenizer_settings
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.output import print_result
from megatron_slm.runtime.reporting import run_command

if TYPE_CHECKING:
    from megatron_slm.inference.generation import Generation
    from megatron_slm.inference.model import InferenceModel
    from megatron_slm.inference.prompts import Prompt
    from megatron_slm.inference.sampling import Decoding

REFUSED = {
    "--prompts": "Use --prompt.",
    "--num-tokens-to-generate": "Use --max-new-tokens.",
    "--top_k": "Use --top-k.",
    "--top_p": "Use --top-p.",
    "--prompt-file": "Use --input, a file of JSON lines with the key prompt.",
    "--context-parallel-size": "Ranks beyond tensor and pipeline parallelism divide the prompts.",
    "--stream": "Text is streamed to the terminal without a flag, and not to --output.",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, an invalid value, or not exactly one source of prompts.
    """
    parser = Parser(description=__doc__)
    _add_files(parser.add_argument)
    _add_decoding(parser.add_argument)
    add_layout_flags(parser.add_argument)
    add_tokenizer_flags(parser.add_argument_group("tokenizer", "default: the tokenizer of the checkpoint's run"))
    arguments = parse_strictly(parser, argv, REFUSED, may_be_empty=("prompt",))
    if bool(arguments.prompt) == bool(arguments.input):
        raise ConfigError("Give the prompts with either --prompt TEXT or --input FILE.")
    if arguments.micro_batch_size < 1:
        raise ConfigError(f"--micro-batch-size is {arguments.micro_batch_size}, and must be above 0.")
    return arguments


def _add_files(add: Callable[..., argparse.Action]) -> None:
    add("--load", type=expand_user, required=True, help="checkpoint directory of the model")
    add_model_flags(add)
    add("--prompt", action="append", metavar="TEXT", help="prompt; may be given several times")
    add("--input", type=expand_user, metavar="FILE", help="JSON lines with the key prompt; - for standard input")
    add(
        "--output",
        type=expand_user,
        metavar="FILE",
        help="write JSON lines with the keys prompt and text; default: stream the text to the terminal",
    )
    add_checkpoint_flags(add)


def _add_decoding(add: Callable[..., argparse.Action]) -> None:
    add("--max-new-tokens", type=int, default=128, help="maximum number of tokens to generate per prompt")
    add("--greedy", action="store_true", help="take the most probable token instead of sampling")
    add("--temperature", type=float, default=1.0, help="divisor of the logits before sampling")
    add("--top-k", type=int, default=0, help="sample among the k most probable tokens; 0 for all")
    add("--top-p", type=float, default=1.0, help="sample among the most probable tokens with this total probability")
    add("--seed", type=int, default=1234, help="seed of sampling; the text depends on it, not on batch or layout")
    add("--ignore-eos", action="store_true", help="continue after the end-of-document token")
    add(
        "--micro-batch-size",
        "--batch-size",
        type=int,
        default=8,
        help="prompts per data-parallel rank and forward pass",
    )
    add(
        "--use-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cache keys and values instead of recomputing them for every token",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(lambda: generate_text(parse_arguments(sys.argv[1:] if argv is None else argv)))


def generate_text(arguments: argparse.Namespace) -> None:
    """Generate text for the prompts of the command line."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.inference.model import open_model
    from megatron_slm.inference.output_file import check_output
    from megatron_slm.inference.prompts import encode_prompts
    from megatron_slm.inference.sampling import Decoding
    from megatron_slm.runtime.collective import on_first_rank

    parallel = given_layout(arguments)
    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens,
        greedy=arguments.greedy,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )
    decoding.check()
    groups = start_ranks(parallel, arguments)
    prompts = on_first_rank(lambda: given_prompts(arguments))
    if arguments.output:
        on_first_rank(lambda: check_output(arguments.output, arguments.input))
    model = open_model(
        arguments.load,
        parallel,
        groups,
        step=arguments.ckpt_step,
        precision=arguments.precision,
        tokenizer_settings=given_tokenizer_settings(arguments),
        verify=arguments.slm_verify_checksums,
    )
    encoded = encode_prompts(prompts, model, decoding)
    run = write_file if arguments.output else stream
    run(model, prompts, encoded, decoding, arguments)


def given_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Return the prompts of the command line or the input file."""
    from megatron_slm.inference.prompts import Prompt, read_prompts

    if arguments.input:
        return read_prompts(arguments.input)
    return [
        Prompt(text, f"--prompt number {number}", {"prompt": text}) for number, text in enumerate(arguments.prompt, 1)
    ]


def generator(
    model: InferenceModel, decoding: Decoding, arguments: argparse.Namespace
) -> Callable[..., list[Generation]]:
    """Return :func:`megatron_slm.inference.generation.generate` with the settings of the command line."""
    from megatron_slm.inference.generation import generate

    settings = {"micro_batch_size": arguments.micro_batch_size, "use_cache": arguments.use_cache}
    return partial(generate, model, decoding=decoding, **settings)


def write_file(
    model: InferenceModel,
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    decoding: Decoding,
    arguments: argparse.Namespace,
) -> None:
    """Generate for the remaining prompts and write the output file. Collective over all ranks."""
    from megatron_slm.inference.output_file import OutputFile, job_key, partial_path
    from megatron_slm.runtime.collective import on_first_rank
    from megatron_slm.runtime.console import notice, progress

    size = arguments.micro_batch_size * model.groups.dp_size
    continue_prompts = generator(model, decoding, arguments)
    files = list[OutputFile]()  # of the first rank

    def open_file() -> int:
        files.append(OutputFile(arguments.output, job_key(model.identity, decoding, prompts)))
        return files[0].finished

    def append(start: int, results: Sequence[Generation]) -> None:
        files[0].append(prompts[start : start + len(results)], results)

    finished = on_first_rank(open_file)
    if finished:
        notice(f"continuing {partial_path(arguments.output)} after {finished:,} prompts")
    with progress("generating", len(prompts), "prompts", enabled=model.groups.is_logging_rank) as bar:
        bar.advance(finished)
        for start in range(finished, len(prompts), size):
            stop = min(start + size, len(prompts))
            results = continue_prompts(encoded[start:stop], first_request=start)
            on_first_rank(partial(append, start, results))
            bar.advance(stop - start)
    on_first_rank(lambda: files[0].publish())


def stream(
    model: InferenceModel,
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    decoding: Decoding,
    arguments: argparse.Namespace,
) -> None:
    """Print every prompt and its text, token by token, in the order of the prompts. Collective over all ranks."""
    size = arguments.micro_batch_size * model.groups.dp_size
    continue_prompts = generator(model, decoding, arguments)
    for start in range(0, len(prompts), size):
        texts = [prompt.text for prompt in prompts[start : start + size]]
        printer = StreamPrinter(texts, is_first=start == 0) if model.groups.is_logging_rank else None
        on_text = printer.add if printer is not None else None
        results = continue_prompts(encoded[start : start + size], first_request=start, on_text=on_text)
        if printer is not None:
            printer.finish([result.text for result in results])


class StreamPrinter:
    """Print the texts of a batch in order: the first one as it grows, the others once those before have ended."""

    def __init__(self, prompts: Sequence[str], *, is_first: bool) -> None:
        self.prompts, self.printed, self.is_first = prompts, [""] * len(prompts), is_first
        self._open(0)

    def add(self, index: int, new: str) -> None:
        """Print new text of the first prompt."""
        if index == 0:
            self.printed[0] += new
            print_result(new)

    def finish(self, texts: Sequence[str]) -> None:
        """Print the remaining texts, and end the last line."""
        for index, text in enumerate(texts):
            if index:
                self._open(index)
            print_result(text[len(self.printed[index]) :] + "\n")

    def _open(self, index: int) -> None:
        print_result(("" if self.is_first and index == 0 else "\n") + self.prompts[index])
