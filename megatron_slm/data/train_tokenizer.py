"""Trains a sentencepiece model with the defaults that Llama-like models use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.data.documents import read_documents
from megatron_slm.runtime.errors import ConfigError

LONGEST_LINE = 4096  # bytes; sentencepiece leaves longer ones out unless told


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
        ConfigError: an input line that cannot be read, or a vocabulary that the text cannot fill.
    """
    import sentencepiece

    target = Path(job.output_prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(job),
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
        for suffix in (".model", ".vocab"):
            Path(f"{partial}{suffix}").unlink(missing_ok=True)
        raise ConfigError(f"--vocab-size {job.vocab_size}: sentencepiece could not train: {error}") from error
    for suffix in (".vocab", ".model"):
        Path(f"{partial}{suffix}").replace(f"{target}{suffix}")
    return Path(f"{target}.model")


def _lines(job: TokenizerJob) -> Iterator[str]:
    """The texts, line by line with the newline, and long lines cut."""
    for document in read_documents(job.files):
        try:
            content = document.content.decode("utf-8")
            text = json.loads(content)[job.json_key] if document.is_json else content
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{document.file}:{document.line}: cannot be read ({error}). Lines are JSON objects with the key "
                f"{job.json_key!r} (--json-key)."
            ) from error
        for line in text.splitlines():
            for begin in range(0, len(line), LONGEST_LINE):
                yield line[begin : begin + LONGEST_LINE]
