"""Tokenizers without files: UTF-8 bytes, and pre-tokenized numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import TOKENS, Tokenizer, TokenizerFiles
from megatron_slm.tokenizers.byte_lengths import ByteLengths

NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
SHOWN = 40  # characters of a text quoted in a message


class ByteTokenizer(Tokenizer):
    """Encode text as UTF-8 bytes; id 256 ends documents."""

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

    def byte_lengths(self) -> ByteLengths:
        return ByteLengths.from_bytes([*(bytes([byte]) for byte in range(256)), b""])


class NullTokenizer(Tokenizer):
    """Parse space-separated ids of pre-tokenized corpora; the last id ends documents."""

    def __init__(self, files: TokenizerFiles) -> None:
        if files.vocab_size is None:
            raise ConfigError("--tokenizer-type NullTokenizer requires --vocab-size.")
        if files.vocab_size < 1:
            raise ConfigError(f"--vocab-size {files.vocab_size}: must be at least 1.")
        super().__init__(hashlib.sha256(f"null {files.vocab_size}".encode()).hexdigest(), "NullTokenizer")
        _refuse_special_tokens(files, self.name)
        self.vocab_size = files.vocab_size
        # the last id, as in Megatron-LM since Megatron-Core 0.19; one higher in earlier versions
        self.eod = files.vocab_size - 1 if files.eod_id is None else files.eod_id

    def encode(self, text: str) -> list[int]:
        return [self._parse_id(number) for number in text.split()]

    def _parse_id(self, number: str) -> int:
        if not NUMBER.fullmatch(number):
            raise ValueError(f"{number[:SHOWN]!r} is not a token id")
        if not 0 <= (token := int(number)) < self.vocab_size:
            raise ValueError(f"the id {token} is outside the vocabulary of {self.vocab_size} (--vocab-size)")
        return token

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


def _refuse_special_tokens(files: TokenizerFiles, name: str) -> None:
    if files.special_tokens == TOKENS:
        raise ConfigError(f"--special-tokens-in-text {TOKENS} has no effect with {name}, which has no special tokens.")
