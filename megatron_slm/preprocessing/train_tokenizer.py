"""Training of a SentencePiece model with the defaults of Llama-like models."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.preprocessing.documents import total_bytes
from megatron_slm.preprocessing.tables import check_tables
from megatron_slm.preprocessing.text_reader import ERROR, BadDocuments, TextReader, read_texts
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import atomic_path, check_output_prefix, check_replaceable, explained_write
from megatron_slm.runtime.output import print_error

MAX_LINE = 4096  # characters; longer lines are split, because sentencepiece would drop them
MIN_LINES = 101  # smallest sample size that sentencepiece accepts
TRIAL = 4096  # bytes written before training, to detect a full disk early
FLAG = "--output-prefix"


@dataclass(frozen=True)
class TokenizerJob:
    """Hold the input, output and settings of a tokenizer training job."""

    files: Sequence[str]
    output_prefix: str
    vocab_size: int
    model_type: str = "bpe"  # or "unigram"
    json_keys: Sequence[str] = ("text",)
    max_lines: int = 1_000_000  # sample size if the input has more lines
    threads: int = 2
    skip_errors: bool = False
    lone_surrogates: str = ERROR  # or "replace"


@dataclass(frozen=True)
class TrainedTokenizer:
    """Hold the path and size of a trained model, and the errors of skipped input."""

    path: Path
    vocab_size: int
    skipped: int
    errors: Sequence[str]  # the first messages


def train_tokenizer(job: TokenizerJob) -> TrainedTokenizer:
    """Train and write ``<output_prefix>.model`` and ``.vocab``; deterministic for the same input.

    The model uses byte fallback, splits digits, preserves white space, and does not normalize; ids 0, 1, 2 are <unk>,
    <s>, </s>.

    Raises:
        ConfigError: the input is unreadable (without ``skip_errors``), the text is too small for the vocabulary, or the
            output cannot be written. An existing model is then unchanged.
    """
    _check(job)
    bad = BadDocuments(job.skip_errors)
    with progress("reading", total_bytes(job.files), "B") as bar:
        model = _train(job, _lines(job, bad, bar.advance))
    size = _write(job.output_prefix, model)
    return TrainedTokenizer(Path(f"{job.output_prefix}.model"), size, bad.count, bad.messages)


def _check(job: TokenizerJob) -> None:
    for flag, value, least in (
        ("--vocab-size", job.vocab_size, 1),
        ("--max-lines", job.max_lines, MIN_LINES),
        ("--threads", job.threads, 1),
    ):
        if value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}.")
    if job.model_type not in ("bpe", "unigram"):
        raise ConfigError(f"--model-type {job.model_type}: must be bpe or unigram.")
    check_tables(job.files, job.json_keys)
    check_output_prefix(job.output_prefix, FLAG)
    if job.output_prefix.endswith((".model", ".vocab")):
        raise ConfigError(f"{FLAG} {job.output_prefix}: omit {job.output_prefix[-6:]} from the prefix.")
    for suffix, is_ours in ((".model", _is_model), (".vocab", _is_vocabulary)):
        check_replaceable(f"{job.output_prefix}{suffix}", FLAG, is_ours=is_ours)
    directory = Path(f"{job.output_prefix}.model").resolve().parent
    with explained_write(job.output_prefix, FLAG):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as trial:
            trial.write(bytes(TRIAL))


def _train(job: TokenizerJob, lines: Iterator[str]) -> bytes:
    """Train and return the model in memory, because sentencepiece does not detect a full disk."""
    import sentencepiece

    model, interrupted = io.BytesIO(), list[BaseException]()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_record_errors(lines, interrupted),
            model_writer=model,
            vocab_size=job.vocab_size,
            model_type=job.model_type,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.99995,
            max_sentence_length=MAX_LINE * 4,
            input_sentence_size=job.max_lines,
            shuffle_input_sentence=True,
            num_threads=job.threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if interrupted:
            raise interrupted[0] from None
        reason = str(error).rpartition("] ")[2].rstrip(".")  # without the location in sentencepiece's source
        if "ocabulary" not in reason:
            raise ConfigError(f"sentencepiece could not train on the --input: {reason}.") from error
        raise ConfigError(
            f"--vocab-size {job.vocab_size}: sentencepiece could not train: {reason}. Byte fallback requires 259 "
            "entries, and a large vocabulary requires more text."
        ) from error
    return model.getvalue()


def _record_errors(lines: Iterator[str], interrupted: list[BaseException]) -> Iterator[str]:
    """Yield the lines, and record an error of the iterator, which sentencepiece turns into a RuntimeError."""
    try:
        yield from lines
    except BaseException as error:
        interrupted.append(error)
        raise


def _lines(job: TokenizerJob, bad: BadDocuments, advance: Callable[[float], None]) -> Iterator[str]:
    """Yield the texts line by line, without newlines (byte fallback encodes them); long lines are split."""
    count = 0
    reader = TextReader(job.json_keys, lone_surrogates=job.lone_surrogates)
    for _, _, texts in read_texts(job.files, reader, bad, advance):
        for text in texts:
            for line in _split(text):
                count += 1
                yield line
    if not count:
        skipped = f" that can be read: {bad.messages[0]}" if bad.messages else ""
        raise ConfigError(f"--input: {', '.join(job.files)} contains no text{skipped}.")
    used = min(count, job.max_lines)
    print_error(f"read {count:,} lines; training on {used:,}, which may take minutes")


def _split(text: str | list[str]) -> Iterator[str]:
    for part in [text] if isinstance(text, str) else text:
        for line in part.splitlines():
            for start in range(0, len(line), MAX_LINE):
                yield line[start : start + MAX_LINE]


def _write(prefix: str, model: bytes) -> int:
    """Write the model and vocabulary files atomically, and return the vocabulary size."""
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    size: int = processor.get_piece_size()
    pieces = [f"{processor.id_to_piece(token)}\t{processor.get_score(token):g}\n" for token in range(size)]
    with (
        atomic_path(f"{prefix}.model", FLAG, is_ours=_is_model) as model_file,
        atomic_path(f"{prefix}.vocab", FLAG, is_ours=_is_vocabulary) as vocabulary_file,
    ):
        model_file.write_bytes(model)
        vocabulary_file.write_text("".join(pieces), encoding="utf-8", newline="\n")
    return size


def _is_model(path: Path) -> bool:
    """Return whether a file is a SentencePiece model or empty (left by an earlier version on a full disk)."""
    import sentencepiece

    try:
        return not path.stat().st_size or bool(sentencepiece.SentencePieceProcessor(model_file=str(path)))
    except (RuntimeError, OSError):
        return False


def _is_vocabulary(path: Path) -> bool:
    """Return whether a file is a SentencePiece vocabulary or empty."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            first = file.readline()
            return not first or first.startswith("<unk>\t")
    except (OSError, UnicodeDecodeError):
        return False
