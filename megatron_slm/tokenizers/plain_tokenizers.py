"""Tokenizers without files: bytes, and numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import TOKENS, BaseTokenizer, TokenizerFiles

NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
SHOWN = 40  # characters of a text, in a message


class ByteTokenizer(BaseTokenizer):
    """The bytes of UTF-8; id 256 ends a document."""

    def __init__(self, files: TokenizerFiles) -> None:
        super().__init__(hashlib.sha256(b"utf-8 bytes").hexdigest(), "ByteTokenizer")
        _refuse_special_tokens(files, self.name)
        self.vocab_size = 257
        self.eod = 256 if files.eod_id is None else files.eod_id
        self.special_ids = frozenset({256})

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")


class NullTokenizer(BaseTokenizer):
    """Numbers separated by spaces, for corpora that are tokenized already; the last id ends a document."""

    def __init__(self, files: TokenizerFiles) -> None:
        if files.vocab_size is None:
            raise ConfigError("--tokenizer-type NullTokenizer needs --vocab-size.")
        if files.vocab_size < 1:
            raise ConfigError(f"--vocab-size is {files.vocab_size}, and must be at least 1.")
        super().__init__(hashlib.sha256(f"null {files.vocab_size}".encode()).hexdigest(), "NullTokenizer")
        _refuse_special_tokens(files, self.name)
        self.vocab_size = files.vocab_size
        # the last id as in Megatron-LM since Megatron-Core 0.19; before it was one more
        self.eod = files.vocab_size - 1 if files.eod_id is None else files.eod_id

    def encode(self, text: str) -> list[int]:
        return [self._id(word) for word in text.split()]

    def _id(self, word: str) -> int:
        if not NUMBER.fullmatch(word):
            raise ValueError(f"{word[:SHOWN]!r} is no token id")
        if not 0 <= (token := int(word)) < self.vocab_size:
            raise ValueError(f"the id {token} is outside the vocabulary of {self.vocab_size} (--vocab-size)")
        return token

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


def _refuse_special_tokens(files: TokenizerFiles, name: str) -> None:
    if files.special_tokens == TOKENS:
        raise ConfigError(f"--special-tokens-in-text {TOKENS} has no effect with {name}, whose texts hold none.")
