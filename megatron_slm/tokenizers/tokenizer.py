"""Tokenizer registry under Megatron-LM's names.

To add a kind, write a subclass of :class:`Tokenizer` and register it in :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import Tokenizer, TokenizerFiles
from megatron_slm.tokenizers.huggingface_tokenizer import GPT2BPETokenizer, HuggingFaceTokenizer
from megatron_slm.tokenizers.plain_tokenizers import ByteTokenizer, NullTokenizer
from megatron_slm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_slm.tokenizers.tiktoken_tokenizer import TikTokenizer

__all__ = ["KINDS", "Tokenizer", "TokenizerFiles", "build_run_tokenizer", "build_tokenizer"]

MAX_IDS = 1 << 31  # corpora store ids as int32
KINDS: dict[str, Callable[[TokenizerFiles], Tokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
    "GPT2BPETokenizer": GPT2BPETokenizer,
    "TikTokenizer": TikTokenizer,
    "ByteTokenizer": ByteTokenizer,
    "NullTokenizer": NullTokenizer,
    "GPTSentencePieceTokenizer": SentencePieceTokenizer,  # as the next one, Megatron-LM's alias
    "Llama2Tokenizer": SentencePieceTokenizer,
}


def build_tokenizer(kind: str | None, files: TokenizerFiles) -> Tokenizer:
    """Build a tokenizer from its kind and settings.

    Raises:
        ConfigError: the kind is unknown, a file is missing or invalid, --vocab-size is below the highest id + 1, an id
            exceeds the range of corpora, or the end-of-document id is outside the vocabulary.
    """
    if kind not in KINDS:
        raise ConfigError(f"--tokenizer-type {kind} is unknown; choose from {', '.join(KINDS)}.")
    tokenizer = KINDS[kind](files)
    size = tokenizer.vocab_size
    if files.vocab_size is not None and files.vocab_size < size:
        raise ConfigError(
            f"--vocab-size {files.vocab_size} is below the size of {tokenizer.source}, whose highest id is {size - 1}. "
            f"Set at least {size}, or omit the flag."
        )
    if size > MAX_IDS:
        raise ConfigError(
            f"{tokenizer.source} has the id {size - 1}, but corpora store ids below 2^31. Check the tokenizer file."
        )
    if not 0 <= tokenizer.eod < size:
        raise ConfigError(
            f"the end-of-document id {tokenizer.eod} is outside the vocabulary of {tokenizer.source} (ids 0 to "
            f"{size - 1}). Set --eod-id to an id of the vocabulary."
        )
    return tokenizer


def build_run_tokenizer(config: RunConfig) -> Tokenizer:
    """Build the tokenizer of a run's configuration.

    Raises:
        ConfigError: see :func:`build_tokenizer` and :meth:`TokenizerFiles.from_config`.
    """
    return build_tokenizer(config.tokenizer.tokenizer_type, TokenizerFiles.from_config(config))
