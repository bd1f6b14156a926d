"""Texts as token sequences, with the text of every token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_slm.inference.prompts import INPUT, read_input, read_prompts
from megatron_slm.inference.text_stream import TextStream
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.byte_lengths import ByteLengths
from megatron_slm.tokenizers.tokenizer import Tokenizer

JSON_LINES = (".jsonl", ".json")
JSON_KEY = "text"


@dataclass(frozen=True)
class EncodedTexts:
    """Represent texts, one after another, as tokens."""

    ids: list[int]  # [n]
    texts: list[str]  # [n]; empty for tokens whose character a later token completes, and for most special tokens
    starts: list[int]  # [texts + 1], the position of the first token of each text, and n

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Return (start, stop) of every text."""
        return list(pairwise(self.starts))


def read_texts(path: str, key: str | None) -> list[tuple[str, str]]:
    """Return (place, text) of every text of a file, or of standard input for ``-``.

    Args:
        path: JSON lines by its suffix, otherwise one plain text.
        key: key of the texts, for JSON lines of any name; None for :data:`JSON_KEY`.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or holds no text.
    """
    if key is not None or path.endswith(JSON_LINES):
        return [(line.place, line.text) for line in read_prompts(path, key or JSON_KEY)]
    content = read_input(path)
    try:
        return [(path, content.decode("utf-8"))]
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{INPUT} {path}, line {line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8. Give a text "
            "file, and convert it if it has another encoding: iconv -f LATIN1 -t UTF-8."
        ) from error


def encode_texts(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], *, append_eod: bool) -> EncodedTexts:
    """Encode texts; those without a token are left out, with a note.

    Args:
        texts: results of :func:`read_texts`.
        append_eod: end each text with the end-of-document token, as in a training corpus.

    Raises:
        ConfigError: the tokenizer refuses a text, or there is no token.
    """
    ids, pieces, starts, lengths = list[int](), list[str](), [0], tokenizer.byte_lengths()
    left_out = list[str]()  # places
    for place, text in texts:
        try:
            encoded = tokenizer.encode(text)
        except ValueError as error:
            raise ConfigError(f"{INPUT}: {place}: {error}") from error
        if not encoded:
            left_out.append(place)
            continue
        ids += encoded
        pieces += token_texts(tokenizer, encoded, lengths)
        if append_eod and encoded[-1] != tokenizer.eod:
            ids.append(tokenizer.eod)
            pieces.append("")
        starts.append(len(ids))
    if not ids:
        raise ConfigError(f"{INPUT} {texts[0][0]} is empty: it has no token to score. Give a file with text.")
    if left_out:
        notice(f"{len(left_out):,} of {len(texts):,} texts have no token and are left out, the first at {left_out[0]}")
    return EncodedTexts(ids, pieces, starts)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int], known: ByteLengths | None) -> list[str]:
    """Return the text of each token; the text of all tokens is that of their concatenation.

    A character that several tokens represent belongs to the last of them.

    Args:
        known: byte lengths of the tokenizer, for long texts of any content.
    """
    data = tokenizer.decode(ids).encode("utf-8", errors="surrogatepass")
    if known is not None:
        lengths = [known.lengths[token] for token in ids]
        lengths[0] -= known.added_spaces[ids[0]]
        if sum(lengths) == len(data):
            decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogatepass")
            return [decoder.decode(data[start:stop]) for start, stop in pairwise(accumulate(lengths, initial=0))]
    stream = TextStream(tokenizer, [])
    pieces = [stream.push(token) for token in ids]
    pieces[-1] += stream.finish()
    return pieces
