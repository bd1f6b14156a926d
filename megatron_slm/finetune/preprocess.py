"""Preprocessing of fine-tuning data to a corpus with one sequence per example and the loss mask of its answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.config.selection import ANSWERS
from megatron_slm.corpus.index import bin_path, partial_prefix
from megatron_slm.corpus.loss_masks import check_mask_writable, write_mask
from megatron_slm.corpus.metadata import remove_metadata, write_metadata
from megatron_slm.finetune.answers import Example, ExampleEncoder
from megatron_slm.finetune.records import RecordReader
from megatron_slm.preprocessing.corpus_writer import CorpusWriter, check_corpus_writable, corpus_dtype
from megatron_slm.preprocessing.documents import Block, InputChunk, is_blank, iter_documents, read_blocks
from megatron_slm.preprocessing.inputs import STDIN, InputFormat, detect_format, input_size
from megatron_slm.preprocessing.journal import OUTPUT
from megatron_slm.preprocessing.tables import decode_objects
from megatron_slm.preprocessing.text_reader import ERROR, UNREADABLE, BadDocuments, describe_error
from megatron_slm.preprocessing.workers import worker_processes
from megatron_slm.runtime.console import progress, warn
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_output_prefix, explained_write, lock_output
from megatron_slm.tokenizers.base import TEXT, TOKENS, TokenizerFiles
from megatron_slm.tokenizers.chat_template import ChatTemplate, find_template
from megatron_slm.tokenizers.identity import tokenizer_identity
from megatron_slm.tokenizers.tokenizer import Tokenizer, build_tokenizer

REFUSE, TRUNCATE, DROP = "refuse", "truncate", "drop"  # --long-examples


@dataclass(frozen=True)
class FinetuneJob:
    """Hold the settings of a job, one field per flag."""

    files: Sequence[str]
    output_prefix: str
    tokenizer_type: str
    tokenizer_files: TokenizerFiles
    chat_template: str | None = None
    seq_length: int | None = None
    long_examples: str = REFUSE
    special_tokens: str = REFUSE  # or "tokens"
    splits_at_system: bool = True
    splits_at_answers: bool = False
    lone_surrogates: str = ERROR
    workers: int = 1
    skip_errors: bool = False

    @property
    def prefix(self) -> str:
        """Return the corpus prefix."""
        return f"{self.output_prefix}_sft_document"


@dataclass
class Counts:
    """Accumulate the counts of a job or a block."""

    examples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0  # longer than --seq-length, or without an answer after truncation
    unended: int = 0  # last answer without end-of-turn token

    def add(self, other: Counts) -> None:
        """Add the counts of a block."""
        longest = max(self.longest, other.longest)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.longest = longest


@dataclass
class Summary(Counts):
    """Hold the counts of a job, with the lines that were skipped."""

    skipped: int = 0
    errors: list[str] = field(default_factory=list)  # the first messages
    seconds: float = 0.0

    def line(self) -> str:
        """Return the summary as one line."""
        share = self.answer_tokens / max(self.tokens, 1)
        parts = [
            f"{self.examples:,} examples",
            f"{self.tokens:,} tokens",
            f"{self.answer_tokens:,} answer tokens ({share:.1%})",
            f"longest {self.longest:,} tokens",
            f"{self.truncated:,} truncated",
            f"{self.dropped:,} dropped",
            f"{self.skipped:,} lines skipped",
        ]
        return ", ".join(parts)


@dataclass
class EncodedExamples:
    """Hold the encoded examples of a block."""

    ids: NDArray[Any]
    lengths: NDArray[np.int32]
    mask: NDArray[np.bool_]
    counts: Counts
    lines: int
    bad: list[tuple[int, str]]  # line in the block, reason


class BlockEncoder:
    """Encode the examples of a block: the task of a worker process."""

    def __init__(self, reader: RecordReader, encoder: ExampleEncoder, job: FinetuneJob, dtype: np.dtype) -> None:
        self.reader, self.encoder, self.job, self.dtype = reader, encoder, job, dtype

    def __call__(self, block: Block) -> EncodedExamples:
        """Encode a block.

        Raises:
            ConfigError: a record is a conversation, and there is no chat template.
        """
        examples: list[Example] = []
        bad: list[tuple[int, str]] = []
        counts = Counts()
        content = block.load()
        for place, document in _documents(block, content):
            try:
                found = [self._limited(self.encoder(record), counts) for record in self.reader(document)]
                examples += [example for example in found if example is not None]
            except UNREADABLE as error:
                bad.append((place, describe_error(error).rstrip(".")))
        if block.damage:
            bad.append((0, f"the file is {block.damage}"))
        return self._encoded(examples, counts, block.lines(content), bad)

    def _limited(self, example: Example, counts: Counts) -> Example | None:
        """Return an example of at most --seq-length tokens, or None if it is dropped.

        Raises:
            ValueError: the example has no answer, or is too long for ``--long-examples refuse``.
        """
        limit, policy, length = self.job.seq_length, self.job.long_examples, len(example.ids)
        example.mask[:1] = [False]  # the first token of an example is never predicted
        if not any(example.mask):
            raise ValueError("no answer: no completion, or no message of the assistant with content")
        last = length - 1 - example.mask[::-1].index(True)
        counts.unended += not self.encoder.ends_turn(example.ids[last])
        if limit is None or length <= limit:
            return example
        if policy == REFUSE:
            raise ValueError(f"{length:,} tokens, more than --seq-length {limit:,} (--long-examples truncate or drop)")
        cut = Example(example.ids[:limit], example.mask[:limit])
        if policy == DROP or not any(cut.mask):
            counts.dropped += 1
            return None
        counts.truncated += 1
        return cut

    def _encoded(
        self, examples: list[Example], counts: Counts, lines: int, bad: list[tuple[int, str]]
    ) -> EncodedExamples:
        ids = np.array([token for example in examples for token in example.ids], np.int64)
        mask = np.array([bit for example in examples for bit in example.mask], bool)
        lengths = np.array([len(example.ids) for example in examples], np.int32)
        counts.examples, counts.tokens, counts.answer_tokens = len(examples), len(ids), int(mask.sum())
        counts.longest = int(lengths.max(initial=0))
        return EncodedExamples(ids.astype(self.dtype), lengths, mask, counts, lines, bad)


def _documents(block: Block, content: bytes) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Yield the place and content of each line of JSON that is not blank, or of each table row."""
    if block.chunk.input_format is InputFormat.TABLE:
        yield from enumerate(decode_objects(content) if content else ())
        return
    for place, line in iter_documents(content, InputFormat.JSON, ()):
        assert isinstance(line, bytes), "lines of JSON are bytes"
        if not is_blank(line):
            yield place, line


def preprocess_examples(job: FinetuneJob) -> Summary:
    """Run a job. The corpus and its mask replace earlier ones only when they are complete.

    Raises:
        ConfigError: a line is not an example (without ``skip_errors``), there are no examples, the output cannot be
            written, the input cannot be read, or settings conflict.
    """
    start = time.monotonic()
    _check(job)
    tokenizer, template = _tokenizer(job), _template(job)
    dtype = corpus_dtype(tokenizer.vocab_size)
    encoder = ExampleEncoder(tokenizer, template, allows_special=job.special_tokens == TOKENS)
    reader = RecordReader(job.splits_at_system, job.splits_at_answers, job.lone_surrogates)
    corpus, summary = CorpusWriter(job.prefix, dtype), Summary()
    masks: list[tuple[NDArray[np.uint8], int]] = []  # packed bits of each block, and their number
    with (
        worker_processes(job.workers, BlockEncoder(reader, encoder, job, dtype)) as encode,
        explained_write(job.output_prefix, OUTPUT),
    ):
        bin_path(job.prefix).parent.mkdir(parents=True, exist_ok=True)
        lock = bin_path(partial_prefix(job.prefix)).open("ab")
        lock_output(lock, OUTPUT)
        try:
            corpus.open()
            for block in _encoded_blocks(job, encode, summary):
                corpus.append(block.ids.tobytes(), block.lengths.tobytes(), np.ones_like(block.lengths).tobytes())
                masks.append((np.packbits(block.mask), len(block.mask)))
            if not summary.examples:
                raise ConfigError(f"--input: {', '.join(job.files)} contains no example.{_first(summary.errors)}")
            if summary.unended:
                warn(
                    f"the last answers of {summary.unended:,} examples end without a special token, so that the model "
                    "does not learn to end them. Check the chat template."
                )
            _publish(job, corpus, tokenizer, template, summary, masks)
        finally:
            corpus.remove()
            lock.close()
    summary.seconds = time.monotonic() - start
    return summary


def _check(job: FinetuneJob) -> None:
    check_output_prefix(job.output_prefix, OUTPUT)
    if job.workers < 1:
        raise ConfigError(f"--workers {job.workers}: must be at least 1.")
    if job.seq_length is not None and job.seq_length < 2:
        raise ConfigError(f"--seq-length {job.seq_length}: must be at least 2.")
    if job.seq_length is None and job.long_examples != REFUSE:
        raise ConfigError(f"--long-examples {job.long_examples} needs --seq-length, the length of the run's samples.")
    for name in job.files:
        if detect_format(name) is InputFormat.PARAGRAPHS:
            raise ConfigError(f"--input {name}: a text contains no examples. Convert it to JSON lines (.jsonl).")
    if job.tokenizer_type == "NullTokenizer":
        raise ConfigError("--tokenizer-type NullTokenizer encodes no text. Give the tokenizer of the model.")
    check_corpus_writable(job.prefix, OUTPUT)
    check_mask_writable(job.prefix, ANSWERS, OUTPUT)


def _tokenizer(job: FinetuneJob) -> Tokenizer:
    """Return the tokenizer, which encodes the special tokens of templates as tokens."""
    special = TEXT if job.tokenizer_type == "ByteTokenizer" else TOKENS
    return build_tokenizer(job.tokenizer_type, replace(job.tokenizer_files, special_tokens=special))


def _template(job: FinetuneJob) -> ChatTemplate | ConfigError:
    """Return the chat template, or the error for conversations if the tokenizer has none."""
    try:
        return find_template(job.chat_template, job.tokenizer_files.model or job.tokenizer_files.vocab)
    except ConfigError as error:
        if job.chat_template is not None:
            raise
        return error


def _encoded_blocks(job: FinetuneJob, encode: Any, summary: Summary) -> Iterator[EncodedExamples]:
    """Yield the encoded blocks of all files in order; count them, and report lines that are no examples."""
    bad = BadDocuments(job.skip_errors, summary.errors)
    total = None if STDIN in job.files else sum(map(input_size, job.files))
    with progress("tokenizing", total, "B") as bar:
        for name in job.files:
            chunk, line = InputChunk(name, detect_format(name)), 1
            for block, encoded in encode(read_blocks(chunk, ())):
                for place, reason in encoded.bad:
                    bad.add(chunk, line + place, reason, is_damage=bool(block.damage))
                line += encoded.lines
                summary.add(encoded.counts)
                bar.advance(block.read)
                yield encoded
    summary.skipped = bad.count


def _publish(
    job: FinetuneJob,
    corpus: CorpusWriter,
    tokenizer: Tokenizer,
    template: ChatTemplate | ConfigError,
    summary: Summary,
    masks: list[tuple[NDArray[np.uint8], int]],
) -> None:
    """Write the index, the mask and the metadata; a kill between two of them leaves no corpus without its mask."""
    corpus.compose()
    counts = {"documents": summary.examples, "tokens": summary.tokens, "skipped": summary.skipped}
    origin = {
        "tool": "preprocess_sft",
        "chat_template": template.fingerprint if isinstance(template, ChatTemplate) else None,
        "seq_length": job.seq_length,
        "long_examples": job.long_examples,
        "truncated": summary.truncated,
        "dropped": summary.dropped,
    }
    parts = (np.unpackbits(bits)[:count].astype(bool) for bits, count in masks)
    write_mask(job.prefix, ANSWERS, parts, origin, files=partial_prefix(job.prefix))
    remove_metadata(job.prefix)
    corpus.publish()
    write_metadata(job.prefix, {"tokenizer": tokenizer_identity(tokenizer), **counts, "append_eod": False})


def _first(errors: list[str]) -> str:
    return f" The first line that was skipped: {errors[0]}." if errors else ""
