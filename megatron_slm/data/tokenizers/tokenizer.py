"""Tokenizers by Megatron-LM's names. A new kind is one small class and a line in :data:`KINDS`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from megatron_slm.data.tokenizers.pretoken_cuts import huggingface_cuts
from megatron_slm.data.tokenizers.sentencepiece_cuts import sentencepiece_cuts
from megatron_slm.data.tokenizers.word_cuts import Uncuttable, WordCuts
from megatron_slm.runtime.errors import ConfigError


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    source: str  # the flag and the file that define it, for messages
    vocab_size: int  # exact, before padding
    eod: int  # id of the end of a document
    fingerprint: str  # sha256 of the files that define it

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def word_cuts(self) -> WordCuts:
        """Where a text may be cut with the same ids; raises Uncuttable, with the reason, where that is not known."""
        ...


@dataclass(frozen=True)
class TokenizerFiles:
    """What the flags name."""

    model: str | None = None  # --tokenizer-model
    vocab: str | None = None  # --vocab-file
    merges: str | None = None  # --merge-file
    vocab_size: int | None = None  # --vocab-size
    tiktoken_pattern: str = "v2"  # --tiktoken-pattern, of Megatron-LM's format
    tiktoken_num_special_tokens: int = 1000  # --tiktoken-num-special-tokens, of Megatron-LM's format


class _Identity:
    """Name and fingerprint, by which Megatron-Core names its caches and we compare runs."""

    def __init__(self, fingerprint: str, source: str) -> None:
        self.name = type(self).__name__
        self.fingerprint, self.source = fingerprint, source

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        return OrderedDict(name=self.name, fingerprint=self.fingerprint)

    def word_cuts(self) -> WordCuts:
        raise Uncuttable(f"{self.name} is as fast without")


class SentencePieceTokenizer(_Identity):
    """A sentencepiece model; the end of a document is its </s>."""

    def __init__(self, files: TokenizerFiles) -> None:
        import sentencepiece

        path = _file(files.model, "--tokenizer-model", "SentencePieceTokenizer")
        super().__init__(fingerprint_of(path), f"--tokenizer-model {path}")
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

    def word_cuts(self) -> WordCuts:
        return sentencepiece_cuts(self.model)


class _TokenizersModel(_Identity):
    """A tokenizer of the library ``tokenizers``."""

    model: Any

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)

    def word_cuts(self) -> WordCuts:
        return huggingface_cuts(self.model)


class HuggingFaceTokenizer(_TokenizersModel):
    """A ``tokenizer.json`` (or the folder that holds it), read offline by the tokenizers library.

    The end of a document is the ``eos_token`` (or ``sep_token``) of the ``tokenizer_config.json`` beside it, and
    without such a file the first of END_OF_DOCUMENT that is in the vocabulary. Special tokens that the file's
    post-processor puts around a text are put there, as in Megatron-LM; truncation and padding are not.
    """

    END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

    def __init__(self, files: TokenizerFiles) -> None:
        import tokenizers

        path = Path(files.model or "")
        path = path / "tokenizer.json" if path.is_dir() else path
        path = _file(str(path) if files.model else None, "--tokenizer-model", "HuggingFaceTokenizer")
        super().__init__(fingerprint_of(path), f"--tokenizer-model {path}")
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise ConfigError(f"--tokenizer-model {path} is not a tokenizer.json: {error}") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.vocab_size = self.model.get_vocab_size(with_added_tokens=True)
        ends = _declared_ends(path.with_name("tokenizer_config.json")) or self.END_OF_DOCUMENT
        self.eod = _first_known(self.model.token_to_id, ends, path)


class GPT2BPETokenizer(_TokenizersModel):
    """GPT-2's byte-level BPE from a vocabulary and a merge file; <|endoftext|> in a text is one token."""

    def __init__(self, files: TokenizerFiles) -> None:
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers

        vocab = _file(files.vocab, "--vocab-file", "GPT2BPETokenizer")
        merges = _file(files.merges, "--merge-file", "GPT2BPETokenizer")
        super().__init__(fingerprint_of(vocab, merges), f"--vocab-file {vocab}, --merge-file {merges}")
        try:
            self.model = Model(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise ConfigError(f"--vocab-file {vocab} and --merge-file {merges} cannot be read: {error}") from error
        self.model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.model.decoder = decoders.ByteLevel()
        self.eod = _first_known(self.model.token_to_id, ("<|endoftext|>",), vocab)
        self.model.add_special_tokens(["<|endoftext|>"])
        self.vocab_size = self.model.get_vocab_size()


class TikTokenizer(_Identity):
    """A tiktoken vocabulary in one of two formats.

    ``.json``, as Megatron-LM reads it: a list of ``{"rank", "token_bytes", "token_str"}``, of which the first
    ``--vocab-size`` less ``--tiktoken-num-special-tokens`` are taken; special tokens come before them, are found in
    texts, and </s> ends a document. Any other name, as tiktoken itself writes it: base64 token and rank a line; special
    tokens are not looked for in texts, and the id behind the last rank ends a document.
    """

    PATTERNS: Final = {
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    OWN_PATTERN: Final = PATTERNS["v2"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    SPECIALS: Final = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
    MOST_TOKENS: Final = 1 << 17  # of Megatron-LM's format, without --vocab-size

    def __init__(self, files: TokenizerFiles) -> None:
        import tiktoken

        path = _file(files.model, "--tokenizer-model", "TikTokenizer")
        settings = f"{files.tiktoken_pattern} {files.tiktoken_num_special_tokens}" if path.suffix == ".json" else ""
        digest = hashlib.sha256(f"{fingerprint_of(path)} {settings}".encode()).hexdigest()
        super().__init__(digest if settings else fingerprint_of(path), f"--tokenizer-model {path}")
        try:
            ranks, specials, pattern = (self._megatron if path.suffix == ".json" else self._own)(path, files)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--tokenizer-model {path} is not a tiktoken file: {error}") from error
        self.specials = frozenset(specials if path.suffix == ".json" else ())  # looked for in texts
        self.eod = max(specials.values()) if "</s>" not in specials else specials["</s>"]
        self.vocab_size = max(*specials.values(), *ranks.values()) + 1
        self.model = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)

    def _own(self, path: Path, files: TokenizerFiles) -> tuple[dict[bytes, int], dict[str, int], str]:
        from tiktoken.load import load_tiktoken_bpe

        ranks = load_tiktoken_bpe(str(path))
        return ranks, {"<|endoftext|>": max(ranks.values()) + 1}, self.OWN_PATTERN

    def _megatron(self, path: Path, files: TokenizerFiles) -> tuple[dict[bytes, int], dict[str, int], str]:
        reserved = files.tiktoken_num_special_tokens
        size = (files.vocab_size or self.MOST_TOKENS) - reserved
        tokens = json.loads(path.read_text(encoding="utf-8"))[:size]
        if len(tokens) < size:
            raise ValueError(f"it holds {len(tokens)} tokens, and --vocab-size asks for {size} beside special ones")
        names = [*self.SPECIALS, *(f"<SPECIAL_{place}>" for place in range(len(self.SPECIALS), reserved))]
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + reserved for token in tokens}
        return ranks, {name: place for place, name in enumerate(names)}, self.PATTERNS[files.tiktoken_pattern]

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, allowed_special=self.specials, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))

    def word_cuts(self) -> WordCuts:
        raise Uncuttable("tiktoken is faster than a word cache that is filling")


class ByteTokenizer(_Identity):
    """The bytes of UTF-8; id 256 ends a document."""

    def __init__(self, files: TokenizerFiles) -> None:
        super().__init__(hashlib.sha256(b"utf-8 bytes").hexdigest(), "ByteTokenizer")
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
        super().__init__(hashlib.sha256(f"null {files.vocab_size}".encode()).hexdigest(), "NullTokenizer")
        self.vocab_size = files.vocab_size
        self.eod = files.vocab_size - 1  # as Megatron-LM since Megatron-Core 0.19; before it was one more

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


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


def _declared_ends(path: Path) -> list[str]:
    """The tokens that a tokenizer_config.json names for the end of a text."""
    if not path.is_file():
        return []
    settings = json.loads(path.read_text(encoding="utf-8"))
    tokens = [settings.get(name) for name in ("eos_token", "sep_token")]
    return [token["content"] if isinstance(token, dict) else token for token in tokens if token]


def _first_known(token_to_id: Callable[[str], int | None], names: Sequence[str], path: Path) -> int:
    for name in names:
        if (token := token_to_id(name)) is not None:
            return token
    raise ConfigError(f"{path} has no token that ends a document (one of {', '.join(names)}).")
