"""What a preprocessing job is told, and what it tells afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from megatron_slm.preprocessing.encode import EncodedBlock
from megatron_slm.preprocessing.shards import Shard
from megatron_slm.preprocessing.text_reader import ERROR
from megatron_slm.tokenizers.tokenizer import TokenizerFiles


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
    nltk_data: str | None = None  # folder of nltk's data, before nltk's own
    workers: int = 1
    use_gigatoken: bool = True  # if it gives the tokenizer's ids
    skip_errors: bool = False
    text_document: str = "paragraph"  # what of a .txt file is a document; or "file"
    lone_surrogates: str = ERROR  # or "replace"
    shard: Shard | None = None
    resume: bool = False
    log_interval: int | None = None  # documents between two lines on standard error; None: the bar alone

    def prefix(self, key: str) -> str:
        """The corpus of one JSON key, named as Megatron-LM names it; its shards lie in a folder of that name."""
        name = f"{self.output_prefix}_{key}_{'sentence' if self.split_sentences else 'document'}"
        return name if self.shard is None else f"{name}/{self.shard[0]:05d}-of-{self.shard[1]:05d}"


@dataclass
class Summary:
    """What a job did, together with the stopped jobs that it went on with."""

    COUNTS: ClassVar = ("documents", "empty", "blank_lines", "text_bytes", "skipped")  # by block

    documents: int = 0
    empty: int = 0  # documents without a token
    blank_lines: int = 0
    text_bytes: int = 0  # of the texts as UTF-8
    skipped: int = 0
    tokens: int = 0  # over all keys
    seconds: float = 0.0  # of this job alone
    resumed: int = 0  # documents that stopped jobs had written
    errors: list[str] = field(default_factory=list)  # the first ones

    def line(self) -> str:
        """All of it in one line."""
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
        parts += [f"{self.resumed:,} documents were there from before"] if self.resumed else []
        return ", ".join(parts)

    def count(self, block: EncodedBlock, tokens: int) -> None:
        """Add what became of a block."""
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + getattr(block, name))
        self.tokens += tokens

    def counts(self) -> tuple[int, ...]:
        """Return the counts for the journal."""
        return tuple(self.record().values())

    def record(self) -> dict[str, int]:
        """Return the counts for the corpus metadata."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def restore(self, counts: Sequence[int], tokens: int) -> None:
        """Go on from the counts of a stopped job."""
        for name, value in zip(self.COUNTS, counts, strict=True):
            setattr(self, name, value)
        self.tokens, self.resumed = tokens, self.documents
