"""Turns documents into ``.bin/.idx`` corpora: workers encode blocks, one writer keeps the order of the input.

Memory does not depend on the size of the input: at most ``3 * workers`` blocks are under way at once, each of 1 MiB of
text or of one longer document, with their ids, beside what a tokenizer takes in each worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_slm.preprocessing.corpus_writer import corpus_dtype
from megatron_slm.preprocessing.documents import Block, Part, blocks_of, first_line
from megatron_slm.preprocessing.encode import BlockEncoder, EncodedBlock
from megatron_slm.preprocessing.engines import build_engine
from megatron_slm.preprocessing.inputs import STDIN, Form, identity_of, is_seekable, size_of
from megatron_slm.preprocessing.job import Job, Summary
from megatron_slm.preprocessing.job_output import JobOutput, finished
from megatron_slm.preprocessing.journal import Progress
from megatron_slm.preprocessing.sentences import prepare_punkt, sentence_splitter
from megatron_slm.preprocessing.shards import plan
from megatron_slm.preprocessing.tables import check_tables
from megatron_slm.preprocessing.text_reader import SHOWN_ERRORS, TextReader, bad_document, stop_at
from megatron_slm.preprocessing.workers import worker_processes
from megatron_slm.runtime.console import progress, warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_output_prefix
from megatron_slm.runtime.reporting import print_error
from megatron_slm.tokenizers.tokenizer import Tokenizer, build_tokenizer

__all__ = ["Job", "Summary", "preprocess"]

Encode = Callable[[Iterable[Block]], Iterator[tuple[Block, EncodedBlock]]]


def preprocess(job: Job) -> Summary:
    """Run a job. The corpora appear under their names only when they are complete.

    A job that was killed leaves its temporary files and a journal, with which a job with ``resume`` goes on; the bytes
    that come out are the same. A job that ends with an error takes them away, unless it has ``resume``.

    Raises:
        ConfigError: a bad document (without ``skip_errors``), nothing to write, output that cannot be written, input
            that cannot be read or has changed, or settings that do not fit together.
    """
    _check(job)
    tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_files)
    if job.append_eod and tokenizer.ends_texts:
        warn(
            f"{tokenizer.source} itself ends every text with the end-of-document token, and --append-eod adds another. "
            "Leave out --append-eod to end documents once."
        )
    dtype = corpus_dtype(tokenizer.vocab_size)
    split = _splitter(job) if job.split_sentences else None
    eod = tokenizer.eod if job.append_eod else None
    engine, reason = build_engine(tokenizer, dtype, job.use_gigatoken)
    if reason:
        print_error(f"{tokenizer.source}: encoded by its own library, which is slower than gigatoken: {reason}")
    reader = TextReader(job.keys, lists=split is None, lone_surrogates=job.lone_surrogates)
    encoder = BlockEncoder(reader, engine, eod, split)
    parts = plan(job.files, job.text_document, job.shard)
    settings = _settings(job, tokenizer)
    if job.resume and (done := finished(job, settings)):
        return done
    began = time.monotonic()
    with worker_processes(job.workers, encoder) as encode, JobOutput(job, dtype, settings) as output:
        if not output.place.is_complete:
            _write_blocks(job, parts, encode, output, tokenizer)
        if not output.summary.documents and job.shard is None:  # of few documents some shards get none
            skipped = f" that can be read: {output.summary.errors[0]}" if output.summary.errors else ""
            raise ConfigError(f"--input: {', '.join(job.files)} holds no document{skipped}.")
        output.finish(tokenizer)
    output.summary.seconds = time.monotonic() - began
    return output.summary


def _splitter(job: Job) -> Callable[[str], list[str]]:
    prepare_punkt(job.language, job.nltk_data)
    return sentence_splitter(job.language, job.keep_newlines, job.nltk_data)


def _check(job: Job) -> None:
    check_output_prefix(job.output_prefix, "--output-prefix")
    if job.workers < 1:
        raise ConfigError(f"--workers is {job.workers}, and must be at least 1.")
    if len(set(job.keys)) < len(job.keys):
        raise ConfigError(f"--json-keys {' '.join(job.keys)} names a key twice. Each makes a corpus of its own.")
    if job.keep_newlines and not job.split_sentences:
        raise ConfigError("--keep-newlines is about the newlines between sentences: give --split-sentences as well.")
    if job.nltk_data is not None and not job.split_sentences:
        raise ConfigError("--nltk-data is for splitting sentences: give --split-sentences as well.")
    for flag, is_given in (("--resume", job.resume), ("--shard", job.shard is not None)):
        if is_given and STDIN in job.files:
            raise ConfigError(f"{flag} needs input that can be read again, and --input - is standard input.")
    check_tables(job.files, job.keys)


def _settings(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be the same for a job to go on with another's files."""
    return {
        "--tokenizer-type": job.tokenizer_type,
        "a tokenizer with the fingerprint": tokenizer.fingerprint,
        "--json-keys": list(job.keys),
        "--append-eod": job.append_eod,
        "a tokenizer with the end-of-document id": tokenizer.eod,
        "--special-tokens-in-text": job.tokenizer_files.special_tokens,
        "--split-sentences": job.split_sentences,
        "--keep-newlines": job.keep_newlines,
        "--lang": job.language,
        "--text-document": job.text_document,
        "--lone-surrogates": job.lone_surrogates,
        "--shard": job.shard,
        "--input": [f"{name} ({identity_of(name)})" for name in job.files if name != STDIN],
    }


def _write_blocks(job: Job, parts: Sequence[Part], encode: Encode, output: JobOutput, tokenizer: Tokenizer) -> None:
    summary, place, began = output.summary, output.place, time.monotonic()
    total = None if STDIN in job.files else sum(map(_bytes_of, parts))
    with progress("tokenizing", total, "B") as bar:
        bar.advance(_bytes_before(parts, place))
        for block, encoded in encode(_blocks(parts, job.keys, place)):
            _note_errors(job, block, encoded, output)
            before = summary.documents
            _check_ids(block, encoded, output, tokenizer)
            output.add(block, encoded)
            bar.advance(block.read)
            if job.log_interval and summary.documents // job.log_interval > before // job.log_interval:
                _log(summary, time.monotonic() - began)


def _blocks(parts: Sequence[Part], keys: Sequence[str], place: Progress) -> Iterator[Block]:
    """The blocks of all parts from a place on."""
    for part in parts:
        if part.number < place.part:
            continue
        yield from blocks_of(part, keys, place.offset if part.number == place.part else 0)


def _note_errors(job: Job, block: Block, encoded: EncodedBlock, output: JobOutput) -> None:
    """Keep the first bad documents for the summary.

    Raises:
        ConfigError: there is one, and the job stops at errors.
    """
    errors = output.summary.errors
    for offset, reason in encoded.bad[: SHOWN_ERRORS - len(errors)]:
        errors.append(bad_document(block.part, first_line(block.part) + output.lines_before(block) + offset, reason))
        if not job.skip_errors:
            raise stop_at(errors[-1], is_damage=bool(block.damage))


def _check_ids(block: Block, encoded: EncodedBlock, output: JobOutput, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a block holds an id outside the vocabulary."""
    for column in encoded.ids:
        ids = np.frombuffer(column, output.dtype)
        if len(ids) and (ids.max() >= tokenizer.vocab_size or ids.min() < 0):
            first = first_line(block.part) + output.lines_before(block)
            lines = f"lines {first} to {first + max(encoded.lines, 1) - 1}"
            outside = ids[(ids >= tokenizer.vocab_size) | (ids < 0)][0]
            raise ConfigError(
                f"{block.part.file}, {lines}: {tokenizer.source} gives the id {outside}, outside its vocabulary of "
                f"{tokenizer.vocab_size} ids. No corpus was written. Check the tokenizer's files: they contradict "
                "each other."
            )


def _bytes_of(part: Part) -> int:
    """Bytes of a part as it lies there, for the bar."""
    if part.form is Form.TABLE or part.end is None:
        return size_of(part.file)
    return part.end - part.begin


def _bytes_before(parts: Sequence[Part], place: Progress) -> int:
    """Bytes that a stopped job has read, for the bar; where the file is read from its beginning, of whole parts."""
    done = sum(_bytes_of(part) for part in parts if part.number < place.part)
    inside = [place.offset - part.begin for part in parts if part.number == place.part and is_seekable(part.file)]
    return done + max([0, *inside])


def _log(summary: Summary, seconds: float) -> None:
    done = summary.documents - summary.resumed
    print_error(f"{summary.documents:,} documents, {done / max(seconds, 1e-9):,.0f} documents/s")
