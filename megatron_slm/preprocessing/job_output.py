"""Output files of a preprocessing job: one corpus per key, and the journal for resuming."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_slm.corpus.index import bin_path, idx_path
from megatron_slm.corpus.metadata import read_metadata, remove_metadata, write_metadata
from megatron_slm.preprocessing.corpus_writer import CorpusWriter, check_corpus_writable
from megatron_slm.preprocessing.documents import Block
from megatron_slm.preprocessing.encode import EncodedBlock
from megatron_slm.preprocessing.job import Job, Summary
from megatron_slm.preprocessing.journal import OUTPUT, Journal, Progress
from megatron_slm.runtime.files import explained_write
from megatron_slm.runtime.output import print_error
from megatron_slm.tokenizers.identity import tokenizer_identity
from megatron_slm.tokenizers.tokenizer import Tokenizer


class JobOutput:
    """Context manager of the output files, which starts from scratch or, if ``resume`` is set, from the journal.

    An error removes the temporary files unless ``resume`` is set; Ctrl-C keeps them.

    Args:
        job: settings of the job.
        dtype: dtype of the token ids.
        settings: settings that must not change when the job is resumed.

    Raises:
        ConfigError: a file cannot be written, another process writes the same output, or a stopped job had other
            settings.
    """

    def __init__(self, job: Job, dtype: np.dtype, settings: dict[str, Any]) -> None:
        self.job, self.dtype, self.settings = job, dtype, settings
        self.corpora = [CorpusWriter(job.prefix(key), dtype) for key in job.keys]
        self.journal = Journal(_journal_path(job), settings)
        self.place = Progress()  # position of the next block
        self.summary = Summary()

    def __enter__(self) -> JobOutput:
        for corpus in self.corpora:
            check_corpus_writable(corpus.prefix, OUTPUT)
        try:
            with self._writing():
                self.journal.path.parent.mkdir(parents=True, exist_ok=True)
                was_there = self.journal.path.is_file()
                self._begin(self.journal.open(self.job.resume, self._has), was_there)
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def lines_before(self, block: Block) -> int:
        """Return the number of lines (or rows) of the next block's chunk before the block."""
        return self.place.line if block.chunk.number == self.place.chunk else 0

    def add(self, block: Block, encoded: EncodedBlock) -> None:
        """Append a block to the corpora, then record it in the journal."""
        line = self.lines_before(block) + encoded.lines
        with self._writing():
            sizes = tuple(
                corpus.append(*columns)
                for corpus, *columns in zip(self.corpora, encoded.ids, encoded.lengths, encoded.sequences, strict=True)
            )
            self.summary.count(encoded, sum(map(len, encoded.ids)) // self.dtype.itemsize)
            chunk = block.chunk.number
            after = (chunk + 1, 0, 0) if block.damage else (chunk, block.end, line)  # reading stops at damage
            self.place = Progress(*after, sizes, self.summary.counts())
            self.journal.add(self.place)

    def finish(self, tokenizer: Tokenizer) -> None:
        """Compose the indices, rename the corpora to their final names, and write their metadata."""
        with self._writing():
            if not self.place.is_complete:
                sizes = tuple(corpus.sizes() for corpus in self.corpora)
                for corpus in self.corpora:
                    corpus.compose()
                self.place = replace(self.place, sizes=sizes, counts=self.summary.counts(), is_complete=True)
                self.journal.add(self.place)
            for corpus, (ids, *_) in zip(self.corpora, self.place.sizes, strict=True):
                remove_metadata(corpus.prefix)
                corpus.publish()
                counts = {**self.summary.named_counts(), "tokens": ids // self.dtype.itemsize}
                flags = {"append_eod": self.job.append_eod, "job": _digest(self.settings)}
                write_metadata(corpus.prefix, {"tokenizer": tokenizer_identity(tokenizer), **counts, **flags})
            self.remove()

    def remove(self) -> None:
        """Remove the temporary files, the journal last."""
        for corpus in self.corpora:
            corpus.remove()
        self.journal.remove()

    def _begin(self, found: Progress | None, was_there: bool) -> None:
        if found is None:
            if was_there:
                hint = "has no complete block" if self.job.resume else "is ignored (--resume continues it)"
                print_error(f"{self.journal.path}: the output of a stopped job {hint}; starting from scratch")
            for corpus in self.corpora:
                corpus.remove()
                corpus.open()
            return
        self.place = found
        self.summary.restore(found.counts, sum(sizes[0] for sizes in found.sizes) // self.dtype.itemsize)
        if not found.is_complete:
            for corpus, sizes in zip(self.corpora, found.sizes, strict=True):
                corpus.open(sizes)

    def _has(self, place: Progress) -> bool:
        return place.is_complete or all(
            corpus.has(sizes) for corpus, sizes in zip(self.corpora, place.sizes, strict=True)
        )

    def _leave(self, error: BaseException | None) -> None:
        """Close the files; after an error, remove them unless ``resume`` is set or another process holds the journal.

        Ctrl-C is no Exception and keeps them.
        """
        if isinstance(error, Exception) and not self.job.resume and self.journal.is_open():
            self.remove()
        for corpus in self.corpora:
            corpus.close()
        self.journal.close()

    def _writing(self) -> AbstractContextManager[None]:
        kept = "Completed blocks are kept: the same command continues the job." if self.job.resume else ""
        return explained_write(self.job.output_prefix, OUTPUT, kept)


def find_finished_job(job: Job, settings: dict[str, Any]) -> Summary | None:
    """Return the summary of an earlier identical job if all its corpora exist, otherwise None."""
    if _journal_path(job).exists():
        return None
    summary = Summary()
    for key in job.keys:
        prefix = job.prefix(key)
        metadata = read_metadata(prefix)
        if metadata is None or not all(path(prefix).is_file() for path in (bin_path, idx_path)):
            return None
        if metadata.get("job") != _digest(settings):
            return None
        summary.restore([metadata[name] for name in Summary.COUNTS], summary.tokens + metadata["tokens"])
    return summary


def _journal_path(job: Job) -> Path:
    return Path(f"{job.prefix(job.keys[0])}.journal")


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()
