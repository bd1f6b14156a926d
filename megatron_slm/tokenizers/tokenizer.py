"""Tokenizers by Megatron-LM's names. A new kind is one small class and a line in :data:`KINDS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import Tokenizer, TokenizerFiles, fingerprint_of
from megatron_slm.tokenizers.huggingface_tokenizer import GPT2BPETokenizer, HuggingFaceTokenizer
from megatron_slm.tokenizers.plain_tokenizers import ByteTokenizer, NullTokenizer
from megatron_slm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_slm.tokenizers.tiktoken_tokenizer import TikTokenizer

__all__ = [
    "KINDS",
    "ByteTokenizer",
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
    "Tokenizer",
    "TokenizerFiles",
    "build_tokenizer",
    "fingerprint_of",
    "tokenizer_of",
]

MOST_IDS = 1 << 31  # of a corpus, as int32
KINDS: dict[str, Callable[[TokenizerFiles], Any]] = {
    **{
        kind.__name__: kind
        for kind in (
            SentencePieceTokenizer,
            HuggingFaceTokenizer,
            GPT2BPETokenizer,
            TikTokenizer,
            ByteTokenizer,
            NullTokenizer,
        )
    },
    # Megatron-LM's other names of the same thing
    "GPTSentencePieceTokenizer": SentencePieceTokenizer,
    "Llama2Tokenizer": SentencePieceTokenizer,
}


def build_tokenizer(kind: str | None, files: TokenizerFiles) -> Tokenizer:
    """Return the tokenizer that the settings define.

    Raises:
        ConfigError: an unknown kind, a file that is missing or foreign, a --vocab-size below the highest id + 1, an id
            that corpora cannot hold, or an end-of-document id outside the vocabulary.
    """
    if kind not in KINDS:
        raise ConfigError(f"--tokenizer-type {kind} is not known. Kinds are {', '.join(KINDS)}.")
    tokenizer: Tokenizer = KINDS[kind](files)
    size = tokenizer.vocab_size
    if files.vocab_size is not None and files.vocab_size < size:
        raise ConfigError(
            f"--vocab-size {files.vocab_size} is below the size of {tokenizer.source}, whose highest id is {size - 1}. "
            f"Give at least {size}, or leave it out."
        )
    if size > MOST_IDS:
        raise ConfigError(f"{tokenizer.source} has the id {size - 1}, and corpora hold ids below 2^31. Check its file.")
    if not 0 <= tokenizer.eod < size:
        raise ConfigError(
            f"the end-of-document id {tokenizer.eod} is outside the vocabulary of {tokenizer.source}, ids 0 to "
            f"{size - 1}. Give --eod-id with an id of the vocabulary."
        )
    return tokenizer


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """Return the tokenizer of a configuration. Errors as of :func:`build_tokenizer`."""
    return build_tokenizer(config.tokenizer.tokenizer_type, TokenizerFiles.of(config))
