"""Trains a sentencepiece model with the defaults that Llama-like models use."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.data.preprocessing.documents import RawDocument, read_documents, total_bytes
from megatron_slm.runtime.console import Advance, progress
from megatron_slm.runtime.errors import ConfigError

LONGEST_LINE = 4096  # characters; longer ones are cut, which sentencepiece would leave out
LEAST_LINES = 101  # that sentencepiece takes as the size of a sample


@dataclass(frozen=True)
class TokenizerJob:
    """What to train on, and what to train."""

    files: Sequence[str]
    output_prefix: str
    vocab_size: int
    model_type: str = "bpe"  # or "unigram"
    json_key: str = "text"
    max_lines: int = 1_000_000  # sampled from more
    threads: int = 2


def train_tokenizer(job: TokenizerJob) -> Path:
    """Train and write ``<output_prefix>.model`` and ``.vocab``; deterministic for the same input.

    Byte fallback, digits one by one, white space kept as it is, no normalisation; ids 0, 1, 2 are <unk>, <s>, </s>.

    Raises:
        ConfigError: an input line that cannot be read, a vocabulary that the text cannot fill, or output that cannot
            be written. A model that was there before is then as it was.
    """
    _check(job)
    target = Path(job.output_prefix)
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.with_name(f"{partial.name}.model").touch()  # whether it can be written shows before the long work
        with progress("reading", total_bytes(job.files), "B") as bar:
            _train(job, _lines(job, bar), partial)
        for suffix in (".vocab", ".model"):
            Path(f"{partial}{suffix}").replace(f"{target}{suffix}")
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {job.output_prefix} cannot be written: {error}. Is the disk full, or the folder "
            "read-only?"
        ) from error
    finally:
        for suffix in (".vocab", ".model"):
            with suppress(OSError):
                Path(f"{partial}{suffix}").unlink()
    return Path(f"{target}.model")


def _check(job: TokenizerJob) -> None:
    for flag, value, least in (
        ("--vocab-size", job.vocab_size, 1),
        ("--max-lines", job.max_lines, LEAST_LINES),
        ("--threads", job.threads, 1),
    ):
        if value < least:
            raise ConfigError(f"{flag} is {value}, and must be at least {least}.")
    if job.model_type not in ("bpe", "unigram"):
        raise ConfigError(f"--model-type should be bpe or unigram, not {job.model_type!r}.")


def _train(job: TokenizerJob, lines: Iterator[str], partial: Path) -> None:
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(partial),
            vocab_size=job.vocab_size,
            model_type=job.model_type,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.99995,
            max_sentence_length=LONGEST_LINE * 4,
            input_sentence_size=job.max_lines,
            shuffle_input_sentence=True,
            num_threads=job.threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--vocab-size {job.vocab_size}: sentencepiece could not train: {error}. Byte fallback alone takes 259 "
            "entries, and a small text cannot fill a large vocabulary."
        ) from error


def _lines(job: TokenizerJob, bar: Advance) -> Iterator[str]:
    """The texts, line by line without the newlines (which fall back to their byte), and long lines cut."""
    count = 0
    for document in read_documents(job.files, [job.json_key]):
        for line in _text(document, job.json_key).splitlines():
            for begin in range(0, len(line), LONGEST_LINE):
                count += 1
                yield line[begin : begin + LONGEST_LINE]
        bar.advance(len(document.content))
    if not count:
        raise ConfigError(f"--input: {', '.join(job.files)} holds no text.")
    used = min(count, job.max_lines)
    print(f"read {count:,} lines; training on {used:,}, which may take minutes", file=sys.stderr, flush=True)


def _text(document: RawDocument, key: str) -> str:
    try:
        content = document.content.decode("utf-8")
        text = json.loads(content)[key] if document.is_json else content
        if not isinstance(text, str):
            raise TypeError(f"the value of {key!r} is not a text")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{document.file}:{document.line}: cannot be read ({error}). Lines are JSON objects with the key {key!r} "
            "(--json-key)."
        ) from error
    return text
