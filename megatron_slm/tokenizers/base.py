"""Tokenizer settings, and the base class of all tokenizers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.byte_lengths import ByteLengths
from megatron_slm.tokenizers.fast_model import FastModel, UnsupportedTokenizer

TEXT, TOKENS = "text", "tokens"  # encoding of special tokens that occur in a text


@dataclass(frozen=True)
class TokenizerFiles:
    """Files and settings of a tokenizer, one field per flag."""

    model: str | None = None  # --tokenizer-model
    vocab: str | None = None  # --vocab-file
    merges: str | None = None  # --merge-file
    vocab_size: int | None = None  # --vocab-size
    tiktoken_pattern: str = "v2"  # --tiktoken-pattern, for Megatron-LM's format
    tiktoken_num_special_tokens: int = 1000  # --tiktoken-num-special-tokens, for Megatron-LM's format
    eod_id: int | None = None  # --eod-id
    special_tokens: str = TEXT  # --special-tokens-in-text

    @classmethod
    def from_config(cls, config: RunConfig, special_tokens: str = TEXT) -> TokenizerFiles:
        """Return the tokenizer settings of a configuration.

        Raises:
            ConfigError: two flags contradict each other.
        """
        given = config.tokenizer
        eod_id = given.eod_id if given.null_tokenizer_eod_id is None else given.null_tokenizer_eod_id
        if given.null_tokenizer_eod_id is not None and given.tokenizer_type != "NullTokenizer":
            raise ConfigError(
                f"--null-tokenizer-eod-id has no effect with --tokenizer-type {given.tokenizer_type}. Use --eod-id."
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


class Tokenizer(ABC):
    """Convert text to token ids and back; base class of all tokenizers.

    Name, fingerprint and end-of-document id identify a tokenizer: they key sample-index caches, and are compared with
    those of corpora.

    Args:
        fingerprint: sha256 of the defining files.
        source: the defining flag and file, for error messages.
    """

    vocab_size: int  # the highest id + 1, before padding
    eod: int  # id of the end-of-document token
    special_ids: frozenset[int] = frozenset()  # ids of control tokens
    special_texts: frozenset[str] = frozenset()  # their texts
    added_texts: frozenset[str] = frozenset()  # texts of all tokens outside of the model, which include them

    def __init__(self, fingerprint: str, source: str) -> None:
        self.name = type(self).__name__
        self.fingerprint, self.source = fingerprint, source

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        return OrderedDict(name=self.name, fingerprint=self.fingerprint, eod=str(self.eod))

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, if the tokenizer's files declare one."""
        return None

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a generated text: the end-of-document token, and those that the tokenizer's files declare."""
        return frozenset((self.eod,))

    @property
    def entries(self) -> int:
        """Number of vocabulary entries, which is less than ``vocab_size`` if ids are unused."""
        return self.vocab_size

    @property
    def ends_texts(self) -> bool:
        """Whether :meth:`encode` already appends the end-of-document token to every text."""
        return False

    def encode_plain(self, text: str) -> list[int]:
        """Encode a text without the tokens that the tokenizer's post-processor adds."""
        return self.encode(text)

    def byte_lengths(self) -> ByteLengths | None:
        """Return the bytes of text that each token represents, or None if they are unknown."""
        return None

    def fast_model(self) -> FastModel:
        """Return the equivalent gigatoken model, or raise UnsupportedTokenizer with the reason."""
        raise UnsupportedTokenizer("")  # no reason to report: the tokenizer is fast already


def fingerprint_files(*paths: Path) -> str:
    """Return the sha256 of the concatenated file contents, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def require_file(path: str | None, flag: str, kind: str) -> Path:
    """Return the path of a required tokenizer file.

    Raises:
        ConfigError: the flag is missing, or the file is missing or unreadable.
    """
    if path is None:
        raise ConfigError(f"--tokenizer-type {kind} requires {flag} FILE.")
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {path}: no such file.")
    try:
        with Path(path).open("rb") as file:
            file.read(1)
            return Path(path)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read ({error.strerror}). Check its permissions (ls -l).") from error


def missing_eod_error(source: str) -> ConfigError:
    """Return the error for a tokenizer without an end-of-document token."""
    return ConfigError(f"{source} has no end-of-document token. Set its id with --eod-id.")
