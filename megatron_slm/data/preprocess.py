"""Turns documents into a ``.bin/.idx`` corpus: worker processes encode, one writer keeps the order of the input."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_slm.data.corpus import bin_path, idx_path, write_record
from megatron_slm.data.documents import RawDocument, read_documents, total_bytes
from megatron_slm.data.sentences import sentence_splitter
from megatron_slm.data.tokenizer import TokenizerFiles, build_tokenizer
from megatron_slm.runtime.console import progress
from megatron_slm.runtime.errors import ConfigError

CHUNK = 32  # documents sent to a worker at once
SHOWN_ERRORS = 5
Encoded = tuple[np.ndarray, list[int]]  # ids of a document, lengths of its sequences


@dataclass(frozen=True)
class Job:
    """One preprocessing job, as the flags describe it."""

    files: Sequence[str]
    keys: Sequence[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_files: TokenizerFiles
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    language: str = "english"
    workers: int = 1
    skip_errors: bool = False

    def prefix(self, key: str) -> str:
        """The corpus of one JSON key, named as Megatron-LM names it."""
        return f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"


@dataclass
class Summary:
    """What a job did."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)  # the first ones

    def line(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.text_bytes / max(self.tokens, 1):.2f} bytes per token, {self.skipped:,} skipped, "
            f"{self.documents / max(self.seconds, 1e-9):,.0f} documents/s"
        )


class _Encoder:
    """Encodes raw documents; built once in every worker process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_files)
        self.split: Callable[[str], list[str]] = lambda text: [text]
        if job.split_sentences:
            self.split = sentence_splitter(job.language, job.keep_newlines)
        self.dtype = DType.optimal_dtype(self.tokenizer.vocab_size)

    def __call__(self, document: RawDocument) -> dict[str, Encoded] | str:
        """Ids by key, or what is wrong with the document."""
        try:
            texts = self._texts(document)
        except (ValueError, KeyError, TypeError) as error:
            return f"{document.file}:{document.line}: {_reason(error)}"
        return {key: self._encode(text) for key, text in texts.items()}

    def _texts(self, document: RawDocument) -> dict[str, str]:
        if not document.is_json:
            return {key: document.content.decode("utf-8") for key in self.job.keys}
        record = json.loads(document.content.decode("utf-8"))
        if not isinstance(record, dict):
            raise TypeError("not a JSON object")
        texts = {key: record[key] for key in self.job.keys}
        for key, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"the value of {key!r} is not a text")
        return texts

    def _encode(self, text: str) -> Encoded:
        ids: list[int] = []
        lengths: list[int] = []
        for sentence in self.split(text):
            encoded = self.tokenizer.encode(sentence)
            if encoded:
                ids += encoded
                lengths.append(len(encoded))
        if ids and self.job.append_eod:
            ids.append(self.tokenizer.eod)
            lengths[-1] += 1
        return np.array(ids, dtype=self.dtype), lengths


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, KeyError):
        return f"the key {error} is missing (--json-keys)"
    return str(error)


def _start_worker(job: Job) -> None:
    _worker.append(_Encoder(job))


def _encode_in_worker(document: RawDocument) -> tuple[int, dict[str, Encoded] | str]:
    return len(document.content), _worker[0](document)


_worker: list[_Encoder] = []  # the encoder of this worker process, which a pool cannot pass along


def preprocess(job: Job) -> Summary:
    """Run a job. The corpora appear under their names only when they are complete.

    Raises:
        ConfigError: a bad document (without ``skip_errors``), nothing to write, or output that cannot be written.
    """
    tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_files)
    if job.split_sentences:
        sentence_splitter(job.language, job.keep_newlines)  # its data is looked for before work begins
    summary = Summary()
    began = time.monotonic()
    partial = {key: f"{job.prefix(key)}.partial" for key in job.keys}
    try:
        Path(job.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        builders = {key: IndexedDatasetBuilder(str(bin_path(name)), dtype=dtype) for key, name in partial.items()}
        _encode_all(job, builders, summary)
        for key, name in partial.items():
            builders[key].finalize(str(idx_path(name)))
            for path in (bin_path, idx_path):
                path(name).replace(path(job.prefix(key)))
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {job.output_prefix} cannot be written: {error}. Is the disk full, or the folder "
            "read-only?"
        ) from error
    finally:
        for name in partial.values():
            bin_path(name).unlink(missing_ok=True)
            idx_path(name).unlink(missing_ok=True)
    summary.seconds = time.monotonic() - began
    for key in job.keys:
        write_record(job.prefix(key), tokenizer, {"documents": summary.documents, "tokens": summary.tokens})
    return summary


def _encode_all(job: Job, builders: dict[str, IndexedDatasetBuilder], summary: Summary) -> None:
    with progress("tokenizing", total_bytes(job.files), "B") as bar:
        for size, encoded in _encoded(job):
            bar.advance(size)
            if isinstance(encoded, str):
                summary.skipped += 1
                if len(summary.errors) < SHOWN_ERRORS:
                    summary.errors.append(encoded)
                if not job.skip_errors:
                    raise ConfigError(f"{encoded}. Mend the line, or go on without such lines: --on-error skip.")
                continue
            summary.documents += 1
            summary.text_bytes += size
            for key, (ids, lengths) in encoded.items():
                summary.tokens += len(ids)
                builders[key].add_document(ids, lengths)
    if not summary.documents:
        raise ConfigError(f"--input: {', '.join(job.files)} holds no document.")


def _encoded(job: Job) -> Iterator[tuple[int, dict[str, Encoded] | str]]:
    """(size in bytes, ids by key or what is wrong) of each document, in the order of the input."""
    documents = read_documents(job.files)
    if job.workers == 1:
        encoder = _Encoder(job)
        for document in documents:
            yield len(document.content), encoder(document)
        return
    with ExitStack() as stack:
        pool = stack.enter_context(multiprocessing.Pool(job.workers, _start_worker, (job,)))
        yield from pool.imap(_encode_in_worker, documents, CHUNK)
