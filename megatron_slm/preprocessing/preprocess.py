"""Preprocessing of documents to ``.bin/.idx`` corpora: workers encode blocks, and one writer keeps the input order.

Memory use is independent of the input size: at most ``3 * workers`` blocks are in flight, each of 1 MiB of text or one
longer document, in addition to the tokenizer of each worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_slm.preprocessing.corpus_writer import corpus_dtype
from megatron_slm.preprocessing.documents import Block, InputChunk, first_line, read_blocks
from megatron_slm.preprocessing.encode import BlockEncoder, EncodedBlock
from megatron_slm.preprocessing.engines import build_engine
from megatron_slm.preprocessing.inputs import STDIN, InputFormat, input_identity, input_size, is_seekable
from megatron_slm.preprocessing.job import Job, Summary
from megatron_slm.preprocessing.job_output import JobOutput, find_finished_job
from megatron_slm.preprocessing.journal import Progress
from megatron_slm.preprocessing.sentences import prepare_punkt, sentence_splitter
from megatron_slm.preprocessing.shards import split_inputs
from megatron_slm.preprocessing.tables import check_tables
from megatron_slm.preprocessing.text_reader import SHOWN_ERRORS, TextReader, describe_bad_document, stop_error
from megatron_slm.preprocessing.workers import worker_processes
from megatron_slm.runtime.console import progress, warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_output_prefix
from megatron_slm.runtime.output import print_error
from megatron_slm.tokenizers.tokenizer import Tokenizer, build_tokenizer

__all__ = ["Job", "Summary", "preprocess"]

Encode = Callable[[Iterable[Block]], Iterator[tuple[Block, EncodedBlock]]]


def preprocess(job: Job) -> Summary:
    """Run a preprocessing job. The corpora are renamed to their final names only when they are complete.

    A killed job leaves its temporary files and a journal; a job with ``resume`` continues from them and produces the
    same bytes. A failed job removes them unless ``resume`` is set.

    Raises:
        ConfigError: a document is unreadable (without ``skip_errors``), there are no documents, the output cannot be
            written, the input is unreadable or has changed, or settings conflict.
    """
    _check(job)
    tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_files)
    if job.append_eod and tokenizer.ends_texts:
        warn(
            f"{tokenizer.source} already appends the end-of-document token to every text, and --append-eod adds "
            "another. Omit --append-eod to end documents once."
        )
    dtype = corpus_dtype(tokenizer.vocab_size)
    split = _splitter(job) if job.split_sentences else None
    eod = tokenizer.eod if job.append_eod else None
    engine, reason = build_engine(tokenizer, dtype, job.use_gigatoken)
    if reason:
        print_error(f"{tokenizer.source}: encoding with the tokenizer's library, slower than gigatoken: {reason}")
    reader = TextReader(job.keys, lists=split is None, lone_surrogates=job.lone_surrogates)
    encoder = BlockEncoder(reader, engine, eod, split)
    chunks = split_inputs(job.files, job.text_document, job.shard)
    settings = _settings(job, tokenizer)
    if job.resume and (done := find_finished_job(job, settings)):
        return done
    start = time.monotonic()
    with worker_processes(job.workers, encoder) as encode, JobOutput(job, dtype, settings) as output:
        if not output.place.is_complete:
            _write_blocks(job, chunks, encode, output, tokenizer)
        if not output.summary.documents and job.shard is None:  # shards of small inputs may be empty
            skipped = f" that can be read: {output.summary.errors[0]}" if output.summary.errors else ""
            raise ConfigError(f"--input: {', '.join(job.files)} contains no document{skipped}.")
        output.finish(tokenizer)
    output.summary.seconds = time.monotonic() - start
    return output.summary


def _splitter(job: Job) -> Callable[[str], list[str]]:
    prepare_punkt(job.language, job.nltk_data)
    return sentence_splitter(job.language, job.keep_newlines, job.nltk_data)


def _check(job: Job) -> None:
    check_output_prefix(job.output_prefix, "--output-prefix")
    if job.workers < 1:
        raise ConfigError(f"--workers {job.workers}: must be at least 1.")
    if len(set(job.keys)) < len(job.keys):
        raise ConfigError(f"--json-keys {' '.join(job.keys)} repeats a key. Name each key once.")
    if job.keep_newlines and not job.split_sentences:
        raise ConfigError("--keep-newlines has no effect without --split-sentences.")
    if job.nltk_data is not None and not job.split_sentences:
        raise ConfigError("--nltk-data has no effect without --split-sentences.")
    for flag, is_given in (("--resume", job.resume), ("--shard", job.shard is not None)):
        if is_given and STDIN in job.files:
            raise ConfigError(f"{flag} requires input files; --input - is standard input, which can be read only once.")
    check_tables(job.files, job.keys)


def _settings(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that must not change when a job is resumed."""
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
        "--input": [f"{name} ({input_identity(name)})" for name in job.files if name != STDIN],
    }


def _write_blocks(
    job: Job, chunks: Sequence[InputChunk], encode: Encode, output: JobOutput, tokenizer: Tokenizer
) -> None:
    summary, place, start = output.summary, output.place, time.monotonic()
    total = None if STDIN in job.files else sum(map(_chunk_bytes, chunks))
    with progress("tokenizing", total, "B") as bar:
        bar.advance(_bytes_read(chunks, place))
        for block, encoded in encode(_blocks(chunks, job.keys, place)):
            _note_errors(job, block, encoded, output)
            before = summary.documents
            _check_ids(block, encoded, output, tokenizer)
            output.add(block, encoded)
            bar.advance(block.read)
            if job.log_interval and summary.documents // job.log_interval > before // job.log_interval:
                _log(summary, time.monotonic() - start)


def _blocks(chunks: Sequence[InputChunk], keys: Sequence[str], place: Progress) -> Iterator[Block]:
    """Yield the blocks of all chunks, starting at ``place``."""
    for chunk in chunks:
        if chunk.number < place.chunk:
            continue
        yield from read_blocks(chunk, keys, place.offset if chunk.number == place.chunk else 0)


def _note_errors(job: Job, block: Block, encoded: EncodedBlock, output: JobOutput) -> None:
    """Add the first unreadable documents to the summary.

    Raises:
        ConfigError: there is one, and ``skip_errors`` is not set.
    """
    errors = output.summary.errors
    for offset, reason in encoded.bad[: SHOWN_ERRORS - len(errors)]:
        errors.append(
            describe_bad_document(block.chunk, first_line(block.chunk) + output.lines_before(block) + offset, reason)
        )
        if not job.skip_errors:
            raise stop_error(errors[-1], is_damage=bool(block.damage))


def _check_ids(block: Block, encoded: EncodedBlock, output: JobOutput, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if a block contains an id outside the vocabulary."""
    for column in encoded.ids:
        ids = np.frombuffer(column, output.dtype)
        if len(ids) and (ids.max() >= tokenizer.vocab_size or ids.min() < 0):
            first = first_line(block.chunk) + output.lines_before(block)
            lines = f"lines {first} to {first + max(encoded.lines, 1) - 1}"
            outside = ids[(ids >= tokenizer.vocab_size) | (ids < 0)][0]
            raise ConfigError(
                f"{block.chunk.file}, {lines}: {tokenizer.source} produced the id {outside}, outside its vocabulary of "
                f"{tokenizer.vocab_size} ids. No corpus was written. Check the tokenizer files for inconsistencies."
            )


def _chunk_bytes(chunk: InputChunk) -> int:
    """Return the size of a chunk on disk, for the progress bar."""
    if chunk.input_format is InputFormat.TABLE or chunk.end is None:
        return input_size(chunk.file)
    return chunk.end - chunk.begin


def _bytes_read(chunks: Sequence[InputChunk], place: Progress) -> int:
    """Return the bytes read by stopped jobs, for the progress bar; of non-seekable chunks, only complete ones count."""
    done = sum(_chunk_bytes(chunk) for chunk in chunks if chunk.number < place.chunk)
    inside = [place.offset - chunk.begin for chunk in chunks if chunk.number == place.chunk and is_seekable(chunk.file)]
    return done + max([0, *inside])


def _log(summary: Summary, seconds: float) -> None:
    done = summary.documents - summary.resumed
    print_error(f"{summary.documents:,} documents, {done / max(seconds, 1e-9):,.0f} documents/s")
