"""Trace the data of a training run: source documents of a step's samples, or the steps that read a document.

Steps are numbered from 1, documents from 0. The newest checkpoint of the run records its sample orders, resumes
included; corpora must be where the run read them. Token ranges count from the beginning of the document, byte ranges
from that of the corpus's .bin file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from megatron_slm.config.flags import Parser, parse_strictly
from megatron_slm.config.paths import expand_user
from megatron_slm.runtime.errors import ConfigError, refuse
from megatron_slm.runtime.reporting import run_tool

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_slm.tokenizers.base import Tokenizer
    from megatron_slm.training.provenance import Provenance, Source

KIND = "provenance"
SHOWN_TEXT = 60  # characters


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an unknown flag, or a missing or invalid value.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--load", type=expand_user, required=True, metavar="DIR", help="--save directory of the run")
    add("--ckpt-step", type=int, help="checkpoint whose record is read; default the newest")
    add("--step", type=int, help="list the documents of this step's samples")
    add("--document", metavar="CORPUS:NUMBER", help="list the steps that read this document, by prefix or corpus name")
    add(
        "--replay-report",
        type=expand_user,
        metavar="FILE",
        help="report of --replay-step for --step, with the selected tokens of each sample",
    )
    add("--max-samples", type=int, default=16, help="samples or occurrences to print; 0 prints all [16]")
    add("--json", type=expand_user, metavar="FILE", help="write all results as JSON")
    arguments = parse_strictly(parser, argv, {})
    problems = []
    if (arguments.step is None) == (arguments.document is None):
        problems.append("give one of --step N and --document CORPUS:NUMBER.")
    if arguments.replay_report is not None and arguments.step is None:
        problems.append("--replay-report has no effect without --step. Add it, or leave it out.")
    if arguments.max_samples < 0:
        problems.append(f"--max-samples is {arguments.max_samples}, and must be 0 or more.")
    refuse(problems)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_tool(lambda: inspect(parse_arguments(sys.argv[1:] if argv is None else argv)))


def inspect(arguments: argparse.Namespace) -> None:
    """Print and write the results of the command line."""
    import megatron_slm.mcore.import_core  # noqa: F401  # before modules that import Megatron-Core
    from megatron_slm.checkpoint.source import find_source
    from megatron_slm.runtime.console import make_console
    from megatron_slm.runtime.files import check_output_file, is_json_of, write_text
    from megatron_slm.training.provenance import Provenance

    is_ours = partial(is_json_of, kind=KIND)
    if arguments.json is not None:
        check_output_file(arguments.json, "--json", is_ours=is_ours)
    source = find_source(arguments.load, arguments.ckpt_step, "--load")
    if not source.is_resumable:
        raise ConfigError(f"--load {arguments.load} has weights only. Give the --save directory of a run.")
    tokenizer = source.tokenizer()
    run = Provenance.open(arguments.load, arguments.ckpt_step, tokenizer)
    show = _show_step if arguments.step is not None else _show_document
    record = show(arguments, run, tokenizer, make_console())
    if arguments.json is not None:
        content = {"kind": KIND, "load": arguments.load, **record}
        write_text(arguments.json, json.dumps(content, indent=1) + "\n", "--json", is_ours=is_ours)


def _show_step(
    arguments: argparse.Namespace, run: Provenance, tokenizer: Tokenizer, console: Console
) -> dict[str, Any]:
    """Print the documents of a step's samples and the shares of the corpora; return both as a JSON object."""
    from megatron_slm.training.provenance import corpus_shares, recorded_metrics, recorded_samples
    from megatron_slm.training.step_report import plain_number

    step = arguments.step
    samples = run.samples(step)
    sources = list(run.sources(step))
    selections, place = recorded_samples(run.config, step, sources, arguments.replay_report)
    shares = corpus_shares(sources, selections)
    console.print(f"step {step} reads the samples {samples.start:,} to {samples.stop - 1:,}", markup=False)
    if step > (reached := run.saved.milestones[-1][0]):
        console.print(
            f"the {_chosen(arguments)} checkpoint is of step {reached:,}; later steps are those of the planned order"
        )
    if step in run.config.training.iterations_to_skip:
        console.print("the step was not trained on (--iterations-to-skip)")
    total, known = sum(share.tokens for share in shares), [share.selected or 0 for share in shares]
    for share in shares:
        line = f"{share.corpus}: {share.samples:,} samples, {share.documents:,} documents, {share.tokens:,} tokens"
        if share.selected is not None:
            line += f", {share.selected:,} selected ({share.selected / max(share.tokens, 1):.1%})"
            line += f", {share.tokens / max(total, 1):.1%} of the tokens"
            line += f" and {share.selected / max(sum(known), 1):.1%} of the selected"
        console.print(line, markup=False)
    metrics, steps = recorded_metrics(run.config, step)
    if (loss := _number(metrics, "loss")) is not None:
        selected = _number(metrics, "share_selected")
        means = "" if steps == 1 else f" (means of up to {steps} steps)"
        rest = "" if selected is None else f", selected {selected:.1%} of all tokens"
        console.print(f"logged{means}: loss {loss:.4f}{rest}")
    console.print(f"selected tokens: {place}", markup=False)
    for line in _shortened(_sample_lines(sources, tokenizer), len(samples), arguments.max_samples):
        console.print(line, markup=False)
    return {
        "step": step,
        "samples": [samples.start, samples.stop],
        "corpora": [asdict(share) for share in shares],
        "selection": place if selections is not None else None,
        "metrics": metrics
        and {name: plain_number(value) if isinstance(value, float) else value for name, value in metrics.items()},
        "sources": [_source_record(source, tokenizer) for source in sources],
    }


def _number(metrics: dict[str, Any] | None, name: str) -> float | None:
    """Return a metric; None if it is not recorded."""
    value = None if metrics is None else metrics.get(name)
    return value if isinstance(value, int | float) else None


def _show_document(
    arguments: argparse.Namespace, run: Provenance, tokenizer: Tokenizer, console: Console
) -> dict[str, Any]:
    """Print the steps that read a document; return them as a JSON object."""
    corpus, document = _parse_document(arguments.document)
    found = list(run.steps_of(corpus, document))
    reached = run.saved.milestones[-1][0]
    steps = list(dict.fromkeys(step for step, _ in found))
    console.print(
        f"document {document} of {corpus}: read in {len(steps)} of the {run.length.iterations:,} steps, "
        f"{sum(step <= reached for step in steps)} of them by step {reached:,}, the {_chosen(arguments)} "
        "checkpoint",
        markup=False,
    )
    if skipped := [step for step in steps if step in run.config.training.iterations_to_skip]:
        console.print(f"steps that were not trained on (--iterations-to-skip): {', '.join(map(str, skipped))}")
    lines = ([f"step {step}, sample {source.sample:,}: {_place(source, tokenizer)}"] for step, source in found)
    for line in _shortened(lines, len(found), arguments.max_samples):
        console.print(line, markup=False)
    occurrences = [{"step": step, **_source_record(source, tokenizer)} for step, source in found]
    return {"document": document, "corpus": corpus, "newest_step": reached, "occurrences": occurrences}


def _chosen(arguments: argparse.Namespace) -> str:
    return "newest" if arguments.ckpt_step is None else "chosen"


def _parse_document(text: str) -> tuple[str, int]:
    corpus, _, number = text.rpartition(":")
    if not corpus or not number.isdecimal():
        raise ConfigError(f"--document {text}: expected CORPUS:NUMBER, for example raw_text_document:17.")
    return corpus, int(number)


def _sample_lines(sources: Sequence[Source], tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Yield the lines of each sample."""
    for sample, spans in groupby(sources, key=lambda source: source.sample):
        yield [f"sample {sample:,}:", *(f"  {_place(span, tokenizer)}" for span in spans)]


def _shortened(groups: Iterator[list[str]], count: int, limit: int) -> Iterator[str]:
    """Yield the lines of the first ``limit`` groups (0: all), and a line on the others."""
    for number, lines in enumerate(groups):
        if limit and number == limit:
            yield f"and {count - limit:,} more (--max-samples 0 prints all, --json writes them)"
            return
        yield from lines


def _place(source: Source, tokenizer: Tokenizer) -> str:
    from megatron_slm.training.provenance import first_words

    first, stop = source.tokens
    text = first_words(source, tokenizer)[:SHOWN_TEXT]
    return (
        f"{source.span.corpus} document {source.span.document}, tokens {first:,} to {stop - 1:,}, bytes "
        f"{source.first_byte:,} to {source.stop_byte - 1:,}: {text!r}"
    )


def _source_record(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    from megatron_slm.training.provenance import first_words

    return {
        "sample": source.sample,
        **asdict(source.span),
        "bytes": [source.first_byte, source.stop_byte],
        "text": first_words(source, tokenizer),
    }
