"""Tokenizers by Megatron-LM's names. A new kind is one small class and a line in :data:`KINDS`."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_slm.runtime.errors import ConfigError


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    vocab_size: int  # exact, before padding
    eod: int  # id of the end of a document
    fingerprint: str  # sha256 of the files that define it

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class TokenizerFiles:
    """What the flags name."""

    model: str | None = None  # --tokenizer-model
    vocab: str | None = None  # --vocab-file
    merges: str | None = None  # --merge-file
    vocab_size: int | None = None  # --vocab-size


class _Identity:
    """Name and fingerprint, by which Megatron-Core names its caches and we compare runs."""

    def __init__(self, fingerprint: str) -> None:
        self.name = type(self).__name__
        self.fingerprint = fingerprint

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        return OrderedDict(name=self.name, fingerprint=self.fingerprint)


class SentencePieceTokenizer(_Identity):
    """A sentencepiece model; the end of a document is its </s>."""

    def __init__(self, files: TokenizerFiles) -> None:
        import sentencepiece

        path = _file(files.model, "--tokenizer-model", "SentencePieceTokenizer")
        super().__init__(fingerprint_of(path))
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"--tokenizer-model {path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self.model.get_piece_size()
        self.eod = self.model.eos_id()
        if self.eod < 0:
            raise ConfigError(f"--tokenizer-model {path} has no end-of-sentence piece, which ends documents.")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


class HuggingFaceTokenizer(_Identity):
    """A ``tokenizer.json`` (or the folder that holds it), read offline by the tokenizers library."""

    END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

    def __init__(self, files: TokenizerFiles) -> None:
        import tokenizers

        path = Path(files.model or "")
        path = path / "tokenizer.json" if path.is_dir() else path
        path = _file(str(path) if files.model else None, "--tokenizer-model", "HuggingFaceTokenizer")
        super().__init__(fingerprint_of(path))
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise ConfigError(f"--tokenizer-model {path} is not a tokenizer.json: {error}") from error
        self.vocab_size = self.model.get_vocab_size(with_added_tokens=True)
        self.eod = _first_known(self.model.token_to_id, self.END_OF_DOCUMENT, path)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)


class GPT2BPETokenizer(_Identity):
    """GPT-2's byte-level BPE from a vocabulary and a merge file."""

    def __init__(self, files: TokenizerFiles) -> None:
        import tokenizers

        vocab = _file(files.vocab, "--vocab-file", "GPT2BPETokenizer")
        merges = _file(files.merges, "--merge-file", "GPT2BPETokenizer")
        super().__init__(fingerprint_of(vocab, merges))
        try:
            self.model = tokenizers.ByteLevelBPETokenizer.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise ConfigError(f"--vocab-file {vocab} and --merge-file {merges} cannot be read: {error}") from error
        self.vocab_size = self.model.get_vocab_size()
        self.eod = _first_known(self.model.token_to_id, ("<|endoftext|>",), vocab)

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)


class TikTokenizer(_Identity):
    """A tiktoken file (base64 token and rank a line); the end of a document is the id behind the last rank."""

    PATTERN = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, files: TokenizerFiles) -> None:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        path = _file(files.model, "--tokenizer-model", "TikTokenizer")
        super().__init__(fingerprint_of(path))
        try:
            ranks = load_tiktoken_bpe(str(path))
        except ValueError as error:
            raise ConfigError(f"--tokenizer-model {path} is not a tiktoken file: {error}") from error
        self.eod = max(ranks.values()) + 1
        self.vocab_size = self.eod + 1
        self.model = tiktoken.Encoding(
            path.name, pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.eod}
        )

    def encode(self, text: str) -> list[int]:
        return self.model.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


class ByteTokenizer(_Identity):
    """The bytes of UTF-8; id 256 ends a document."""

    def __init__(self, files: TokenizerFiles) -> None:
        super().__init__(hashlib.sha256(b"utf-8 bytes").hexdigest())
        self.vocab_size, self.eod = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < self.eod).decode("utf-8", errors="replace")


class NullTokenizer(_Identity):
    """Numbers separated by spaces, for corpora that are tokenized already; the last id ends a document."""

    def __init__(self, files: TokenizerFiles) -> None:
        if files.vocab_size is None:
            raise ConfigError("--tokenizer-type NullTokenizer needs --vocab-size.")
        super().__init__(hashlib.sha256(f"null {files.vocab_size}".encode()).hexdigest())
        self.eod = files.vocab_size  # Megatron-LM, too, puts it behind the given vocabulary
        self.vocab_size = files.vocab_size + 1

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


KINDS: dict[str, Callable[[TokenizerFiles], Any]] = {
    kind.__name__: kind
    for kind in (
        SentencePieceTokenizer,
        HuggingFaceTokenizer,
        GPT2BPETokenizer,
        TikTokenizer,
        ByteTokenizer,
        NullTokenizer,
    )
}


def build_tokenizer(kind: str | None, files: TokenizerFiles) -> Tokenizer:
    """The tokenizer that the flags name.

    Raises:
        ConfigError: an unknown kind, or a file that is missing or foreign.
    """
    if kind not in KINDS:
        raise ConfigError(f"--tokenizer-type {kind} is not known. Kinds are {', '.join(KINDS)}.")
    tokenizer: Tokenizer = KINDS[kind](files)
    if kind != "NullTokenizer" and files.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"--vocab-size {files.vocab_size} is not the tokenizer's size, {tokenizer.vocab_size}. Leave it out."
        )
    return tokenizer


def fingerprint_of(*paths: Path) -> str:
    """sha256 over the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _file(path: str | None, flag: str, kind: str) -> Path:
    if path is None:
        raise ConfigError(f"--tokenizer-type {kind} needs {flag}, a file.")
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {path}: there is no such file.")
    return Path(path)


def _first_known(token_to_id: Callable[[str], int | None], names: Sequence[str], path: Path) -> int:
    for name in names:
        if (token := token_to_id(name)) is not None:
            return token
    raise ConfigError(f"{path} has no token that ends a document (one of {', '.join(names)}).")
