"""Number of UTF-8 bytes of text that each token represents, for losses in bits per byte."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_slm.tokenizers.huggingface_fast import byte_characters, decoder_kinds

SPACE = "▁"  # a space in SentencePiece vocabularies


@dataclass(frozen=True)
class ByteLengths:
    """Hold the bytes of every token id, so that the bytes of a text are the sum over its tokens.

    Special tokens have none. If the tokenizer adds a space at the start of each text, the first token has one byte less
    of text.
    """

    lengths: list[int]  # [vocab_size]
    added_spaces: list[int]  # [vocab_size], 1 for tokens whose first byte is not in the text at the start of a text

    @staticmethod
    def from_bytes(texts: Iterable[bytes], *, adds_space: bool = False) -> ByteLengths:
        """Return the lengths of tokens from their bytes."""
        texts = list(texts)
        return ByteLengths([len(text) for text in texts], [int(adds_space and text[:1] == b" ") for text in texts])


def sentencepiece_byte_lengths(model: Any) -> ByteLengths:
    """Return the byte lengths of a SentencePiece model; an unknown token counts as its decoded character."""

    def text(token: int) -> bytes:
        if model.is_control(token) or model.is_unused(token):
            return b""
        if model.is_byte(token):
            return b"\0"
        piece = model.decode([token]).strip() if model.is_unknown(token) else model.id_to_piece(token)
        return piece.replace(SPACE, " ").encode()

    first = model.encode("a")[:1]
    adds_space = bool(first) and model.id_to_piece(first[0]).startswith(SPACE)
    return ByteLengths.from_bytes(map(text, range(model.get_piece_size())), adds_space=adds_space)


def huggingface_byte_lengths(model: Any, size: int) -> ByteLengths | None:
    """Return the byte lengths of a byte-level or SentencePiece-like ``tokenizers.Tokenizer``; None for another."""
    kinds = decoder_kinds(json.loads(model.to_str()))
    added = model.get_added_tokens_decoder()
    is_byte_level = "ByteLevel" in kinds
    if not is_byte_level and not kinds & {"Metaspace", "Replace", "ByteFallback"}:
        return None
    decode = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
    names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if "ByteFallback" in kinds else {}

    def text(token: int) -> bytes:
        piece = model.id_to_token(token) or ""
        if token in added and piece not in names:
            return b"" if added[token].special else piece.encode()
        if is_byte_level:
            return b"".join(decode.get(character, character.encode()) for character in piece)
        return names.get(piece, piece.replace(SPACE, " ").encode())

    first = model.encode("a", add_special_tokens=False).ids[:1]
    adds_space = bool(first) and text(first[0]).startswith(b" ")
    return ByteLengths.from_bytes(map(text, range(size)), adds_space=adds_space)
