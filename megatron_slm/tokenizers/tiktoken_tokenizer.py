"""tiktoken tokenizer."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import TOKENS, Tokenizer, TokenizerFiles, fingerprint_files, require_file
from megatron_slm.tokenizers.byte_lengths import ByteLengths
from megatron_slm.tokenizers.fast_model import FastModel
from megatron_slm.tokenizers.tiktoken_fast import tiktoken_fast_model

UTF8_BYTES: Final = (*range(0xC0), *range(0xC2, 0xF5))  # byte values that occur in UTF-8 text
Vocabulary = tuple[dict[bytes, int], dict[str, int], str]  # ranks, special tokens, pattern


class TikTokenizer(Tokenizer):
    """Load a tiktoken vocabulary in one of two formats.

    ``.json`` (Megatron-LM's format): a list of ``{"rank", "token_bytes", "token_str"}``, of which the first
    ``--vocab-size`` minus ``--tiktoken-num-special-tokens`` are used. The special tokens have the lowest ids, and </s>
    ends documents.
    Any other suffix (tiktoken's format): one base64 token and its rank per line. The id after the last rank ends
    documents.

    Special tokens that occur in a text are encoded as text, unless ``special_tokens`` is "tokens" (as in Megatron-LM).
    """

    PATTERNS: Final = {
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    TIKTOKEN_PATTERN: Final = PATTERNS["v2"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    SPECIALS: Final = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
    MAX_TOKENS: Final = 1 << 17  # default of --vocab-size for Megatron-LM's format

    def __init__(self, files: TokenizerFiles) -> None:
        import tiktoken

        path = require_file(files.model, "--tokenizer-model", "TikTokenizer")
        is_megatrons = path.suffix.lower() == ".json"
        settings = f"{files.tiktoken_pattern} {files.tiktoken_num_special_tokens}" if is_megatrons else ""
        digest = hashlib.sha256(f"{fingerprint_files(path)} {settings}".encode()).hexdigest()
        super().__init__(digest if settings else fingerprint_files(path), f"--tokenizer-model {path}")
        read = _read_megatron_format if is_megatrons else _read_tiktoken_format
        try:
            self._vocabulary = ranks, specials, pattern = read(path, files)
            self.vocab_size = max(*specials.values(), *ranks.values()) + 1
            _check_ranks(ranks, specials)
            self.model = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"--tokenizer-model {path} is not a tiktoken file: {error}") from error
        self.special_ids = frozenset(specials.values())
        self.special_texts = self.added_texts = frozenset(specials)
        self.specials = frozenset(specials if files.special_tokens == TOKENS else ())  # recognized in texts
        end = specials["</s>"] if is_megatrons else max(specials.values(), default=0)
        self.eod = end if files.eod_id is None else files.eod_id

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, allowed_special=self.specials, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))

    def byte_lengths(self) -> ByteLengths:
        texts = {token: text for text, token in self._vocabulary[0].items()}
        return ByteLengths.from_bytes(texts.get(token, b"") for token in range(self.vocab_size))

    def fast_model(self) -> FastModel:
        ranks, specials, pattern = self._vocabulary
        found = {name: token for name, token in specials.items() if name in self.specials}
        return tiktoken_fast_model(ranks, found, pattern)


def _check_ranks(ranks: dict[bytes, int], specials: dict[str, int]) -> None:
    """Raise ValueError for vocabularies that crash tiktoken.

    tiktoken aborts the process if a text contains a byte outside the vocabulary, or if two tokens share an id.
    """
    counts = Counter([*ranks.values(), *specials.values()])
    for token, count in counts.items():
        if token < 0 or count > 1:
            raise ValueError(f"the id {token} is " + ("negative" if token < 0 else "assigned to two tokens"))
    missing = [byte for byte in UTF8_BYTES if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"none of the {len(ranks)} tokens is byte 0x{missing[0]:02X}. Megatron-LM's format uses --vocab-size minus "
            "--tiktoken-num-special-tokens tokens: increase --vocab-size, or omit it"
        )


def _read_tiktoken_format(path: Path, files: TokenizerFiles) -> Vocabulary:
    ranks = {}  # not read by tiktoken, which caches local files by name and might return stale content
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"line {number} is not a token in base64 and its rank") from error
    if not ranks:
        raise ValueError("it contains no tokens")
    end = max(ranks.values()) + 1 if files.eod_id is None else files.eod_id
    return ranks, {} if end in ranks.values() else {"<|endoftext|>": end}, TikTokenizer.TIKTOKEN_PATTERN


def _read_megatron_format(path: Path, files: TokenizerFiles) -> Vocabulary:
    reserved, least = files.tiktoken_num_special_tokens, len(TikTokenizer.SPECIALS)
    most = files.vocab_size or TikTokenizer.MAX_TOKENS
    if not least <= reserved < most:
        raise ConfigError(
            f"--tiktoken-num-special-tokens {reserved}: must be at least {least} and below --vocab-size {most}."
        )
    if files.tiktoken_pattern not in TikTokenizer.PATTERNS:
        raise ConfigError(
            f"--tiktoken-pattern must be one of {', '.join(TikTokenizer.PATTERNS)}, not {files.tiktoken_pattern!r}."
        )
    tokens = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tokens, list):
        raise ValueError("it must contain a list of tokens, each with rank and token_bytes")
    tokens = tokens[: most - reserved]
    names = [*TikTokenizer.SPECIALS, *(f"<SPECIAL_{place}>" for place in range(least, reserved))]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] + reserved for token in tokens}
    if not ranks:
        raise ValueError("it contains no tokens")
    return ranks, {name: place for place, name in enumerate(names)}, TikTokenizer.PATTERNS[files.tiktoken_pattern]
