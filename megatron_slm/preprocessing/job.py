"""Settings and summary of a preprocessing job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_slm.preprocessing.encode import EncodedBlock
from megatron_slm.preprocessing.shards import InputShard
from megatron_slm.preprocessing.text_reader import ERROR
from megatron_slm.tokenizers.tokenizer import TokenizerFiles


@dataclass(frozen=True)
class Job:
    """Hold the settings of a preprocessing job, one field per flag."""

    files: Sequence[str]
    keys: Sequence[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_files: TokenizerFiles
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    language: str = "english"
    nltk_data: str | None = None  # nltk data directory, searched before nltk's default ones
    workers: int = 1
    use_gigatoken: bool = True  # if it reproduces the tokenizer's ids
    skip_errors: bool = False
    text_document: str = "paragraph"  # unit of a .txt file that is a document; or "file"
    lone_surrogates: str = ERROR  # or "replace"
    shard: InputShard | None = None
    resume: bool = False
    log_interval: int | None = None  # documents between log lines on standard error; None: only the progress bar

    def prefix(self, key: str) -> str:
        """Return the corpus prefix of a JSON key, as in Megatron-LM; shards are files in a directory of that name."""
        name = f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"
        return name if self.shard is None else f"{name}/{self.shard[0]:05d}-of-{self.shard[1]:05d}"


@dataclass
class Summary:
    """Accumulate the counts of a job, including those of the stopped jobs that it resumed."""

    COUNTS: ClassVar = ("documents", "empty", "blank_lines", "text_bytes", "skipped")  # counted per block

    documents: int = 0
    empty: int = 0  # documents without a token
    blank_lines: int = 0
    text_bytes: int = 0  # UTF-8 size of the texts
    skipped: int = 0
    tokens: int = 0  # over all keys
    seconds: float = 0.0  # duration of this job, without resumed ones
    resumed: int = 0  # documents written by stopped jobs
    errors: list[str] = field(default_factory=list)  # the first messages

    def line(self) -> str:
        """Return the summary as one line."""
        done = self.documents - self.resumed
        parts = [
            f"{self.documents:,} documents",
            f"{self.tokens:,} tokens",
            f"{self.text_bytes / max(self.tokens, 1):.2f} bytes per token",
            f"{self.skipped:,} skipped",
            f"{done / max(self.seconds, 1e-9):,.0f} documents/s",
        ]
        parts += [f"{self.empty:,} without a token"] if self.empty else []
        parts += [f"{self.blank_lines:,} blank lines"] if self.blank_lines else []
        parts += [f"{self.resumed:,} documents resumed"] if self.resumed else []
        return ", ".join(parts)

    def count(self, block: EncodedBlock, tokens: int) -> None:
        """Add the counts of a block."""
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + getattr(block, name))
        self.tokens += tokens

    def counts(self) -> tuple[int, ...]:
        """Return the counts for the journal."""
        return tuple(self.named_counts().values())

    def named_counts(self) -> dict[str, int]:
        """Return the counts by name for the corpus metadata."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def restore(self, counts: Sequence[int], tokens: int) -> None:
        """Continue from the counts of a stopped job."""
        for name, value in zip(self.COUNTS, counts, strict=True):
            setattr(self, name, value)
        self.tokens, self.resumed = tokens, self.documents
