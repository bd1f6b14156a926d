"""The tokenizer interface, the settings that define a tokenizer, and the parts that all kinds share."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.fast_model import FastModel, UnsupportedTokenizer

TEXT, TOKENS = "text", "tokens"  # how special tokens that occur in a text are encoded


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    source: str  # the flag and the file that define it, for messages
    vocab_size: int  # the highest id + 1, before padding
    eod: int  # id of the end-of-document token
    special_ids: frozenset[int]  # ids of control tokens
    fingerprint: str  # sha256 of the files that define it

    @property
    def entries(self) -> int:
        """The number of entries, which is less than ``vocab_size`` if the vocabulary has holes."""
        ...

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]: ...

    @property
    def ends_texts(self) -> bool:
        """Whether the tokenizer itself ends every text with the end-of-document token."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def fast_model(self) -> FastModel:
        """Return the same tokenizer for gigatoken, or raise UnsupportedTokenizer with the reason."""
        ...


@dataclass(frozen=True)
class TokenizerFiles:
    """The files and settings from which a tokenizer is built, as the flags give them."""

    model: str | None = None  # --tokenizer-model
    vocab: str | None = None  # --vocab-file
    merges: str | None = None  # --merge-file
    vocab_size: int | None = None  # --vocab-size
    tiktoken_pattern: str = "v2"  # --tiktoken-pattern, of Megatron-LM's format
    tiktoken_num_special_tokens: int = 1000  # --tiktoken-num-special-tokens, of Megatron-LM's format
    eod_id: int | None = None  # --eod-id
    special_tokens: str = TEXT  # --special-tokens-in-text

    @classmethod
    def of(cls, config: RunConfig, special_tokens: str = TEXT) -> TokenizerFiles:
        """Return the tokenizer settings of a configuration.

        Raises:
            ConfigError: flags that contradict each other.
        """
        given = config.tokenizer
        eod_id = given.eod_id if given.null_tokenizer_eod_id is None else given.null_tokenizer_eod_id
        if given.null_tokenizer_eod_id is not None and given.tokenizer_type != "NullTokenizer":
            raise ConfigError(
                f"--null-tokenizer-eod-id has no effect with --tokenizer-type {given.tokenizer_type}. Give --eod-id."
            )
        if given.eod_id not in (None, eod_id):
            raise ConfigError(
                f"--eod-id {given.eod_id} contradicts --null-tokenizer-eod-id {eod_id}. Give one of them."
            )
        return cls(
            given.tokenizer_model,
            given.vocab_file,
            given.merge_file,
            config.model.vocab_size,
            given.tiktoken_pattern,
            given.tiktoken_num_special_tokens,
            eod_id,
            special_tokens,
        )


class BaseTokenizer:
    """Name, fingerprint and end-of-document id, by which caches are named and corpora compared."""

    vocab_size: int
    eod: int
    special_ids: frozenset[int] = frozenset()

    def __init__(self, fingerprint: str, source: str) -> None:
        self.name = type(self).__name__
        self.fingerprint, self.source = fingerprint, source

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        return OrderedDict(name=self.name, fingerprint=self.fingerprint, eod=str(self.eod))

    @property
    def entries(self) -> int:
        return self.vocab_size

    @property
    def ends_texts(self) -> bool:
        return False

    def fast_model(self) -> FastModel:
        raise UnsupportedTokenizer("")  # it is fast


def fingerprint_of(*paths: Path) -> str:
    """Return the sha256 over the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def required_file(path: str | None, flag: str, kind: str) -> Path:
    """Return the path of a file that a kind of tokenizer needs.

    Raises:
        ConfigError: the flag was not given, or names no file that can be read.
    """
    if path is None:
        raise ConfigError(f"--tokenizer-type {kind} needs {flag}, a file.")
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {path}: there is no such file.")
    try:
        with Path(path).open("rb") as file:
            file.read(1)
            return Path(path)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read ({error.strerror}). Check its permissions (ls -l).") from error


def no_eod(source: str) -> ConfigError:
    """Return the error for a tokenizer without an end-of-document token."""
    return ConfigError(
        f"{source} has no end-of-document token. Give the id of the token that ends documents with --eod-id."
    )
