"""An exact word cache: texts are cut where the tokenizer allows it, and each distinct word is encoded once.

The ids of words are kept as bytes, as a ``.bin`` holds them, and joined. Where words have pieces, which repeat far more
often than words do, a word that is not yet known is joined of those, and only a new piece goes through the tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.data.tokenizers.word_cuts import Uncuttable, WordCuts
from megatron_slm.runtime.errors import ConfigError

CHECK_EVERY = 200  # texts; the check costs a few percent where the cache is ten times faster than the tokenizer
MOST_WORDS = 1 << 19  # kept at once; then all are forgotten, so that the cache follows a corpus that changes
MOST_PIECES = 1 << 18
LONGEST_WORD = 64  # characters; longer ones rarely come again and are not kept
SHOWN = 60  # characters of a text, in a message

Encode = Callable[[str], bytes]


def fast_encoder(tokenizer: Tokenizer, dtype: Any, *, check_every: int = CHECK_EVERY) -> Encode:
    """A function from a text to its token ids as the bytes of an array of ``dtype``, which is what a ``.bin`` holds.

    It gives ``np.array(tokenizer.encode(text), dtype).tobytes()`` on every text, through a word cache where the
    tokenizer allows an exact one, and otherwise the plain way. The cache holds at most MOST_WORDS words and MOST_PIECES
    pieces of up to LONGEST_WORD characters: about 150 MB for ordinary text.

    Args:
        tokenizer: of any kind.
        dtype: of the ids.
        check_every: the first text and every so many after it are also encoded the plain way; 0 checks none.

    Raises:
        ConfigError: by the function returned, when the two ways differ.
        UnicodeEncodeError: by the function returned, for a text with half a surrogate pair.
    """
    plain = plain_encoder(tokenizer, dtype)
    try:
        cached = _CachedEncoder(tokenizer.word_cuts(), plain, dtype)
    except Uncuttable:
        return plain
    return _CheckedEncoder(tokenizer, cached, plain, dtype, check_every) if check_every else cached


def plain_encoder(tokenizer: Tokenizer, dtype: Any) -> Encode:
    """What :func:`fast_encoder` gives, by the tokenizer alone."""
    typecode = np.dtype(dtype).char

    def encode(text: str) -> bytes:
        try:
            return array(typecode, tokenizer.encode(text)).tobytes()
        except (RuntimeError, TypeError):
            text.encode("utf-8")  # half a surrogate pair is a UnicodeEncodeError, whatever a library makes of it
            raise

    return encode


def why_plain(tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer has no exact word cache; None where it has one."""
    try:
        tokenizer.word_cuts()
    except Uncuttable as reason:
        return str(reason)
    return None


class _Cache(dict[str, bytes]):
    """Bytes of words; those of a new one are made when it is looked up."""

    def __init__(self, make: Encode, most: int) -> None:
        super().__init__()
        self.make, self.most = make, most

    def __missing__(self, word: str) -> bytes:
        made = self.make(word)
        if len(word) <= LONGEST_WORD:
            if len(self) >= self.most:
                self.clear()
            self[word] = made
        return made


class _CachedEncoder:
    """Encodes texts word by word."""

    def __init__(self, cuts: WordCuts, plain: Encode, dtype: Any) -> None:
        typecode = np.dtype(dtype).char
        self.cuts, self.plain = cuts, plain
        self.before, self.after = (array(typecode, ids).tobytes() for ids in (cuts.before, cuts.after))

        def encode(word: str) -> bytes:
            return array(typecode, cuts.encode(word)).tobytes()

        self.words = _Cache(encode, MOST_WORDS)
        if cuts.pieces is not None:
            split, look_up = cuts.pieces, _Cache(encode, MOST_PIECES).__getitem__
            self.words.make = lambda word: b"".join(map(look_up, split(word)))

    def __call__(self, text: str) -> bytes:
        cuts = self.cuts
        if cuts.whole(text):
            return self.plain(text)
        try:
            ids = b"".join(map(self.words.__getitem__, cuts.words(cuts.prepare(text))))
        except (RuntimeError, TypeError):
            return self.plain(text)  # for its error
        return self.before + ids + self.after if self.before or self.after else ids


class _CheckedEncoder:
    """Holds some of the texts against the plain way."""

    def __init__(self, tokenizer: Tokenizer, cached: Encode, plain: Encode, dtype: Any, check_every: int) -> None:
        self.tokenizer, self.cached, self.plain = tokenizer, cached, plain
        self.dtype, self.check_every = np.dtype(dtype), check_every
        self.texts = 0

    def __call__(self, text: str) -> bytes:
        ids = self.cached(text)
        if self.texts % self.check_every == 0 and ids != (wanted := self.plain(text)):
            raise ConfigError(
                self._difference(text, *(np.frombuffer(way, self.dtype).tolist() for way in (ids, wanted)))
            )
        self.texts += 1
        return ids

    def _difference(self, text: str, got: Sequence[int], wanted: Sequence[int]) -> str:
        shared = min(len(got), len(wanted))
        place = next((i for i in range(shared) if got[i] != wanted[i]), shared)
        return (
            f"{self.tokenizer.source}: the word cache gives other ids than the tokenizer. The first difference is at "
            f"token {place} ({_id_at(got, place)}, and {_id_at(wanted, place)} by the tokenizer), behind "
            f"{self.tokenizer.decode(wanted[:place])[-SHOWN:]!r}, in a text that begins {text[:SHOWN]!r}. "
            "No corpus was written. Start again with --no-word-cache, and please report this with the tokenizer's file "
            "and the text."
        )


def _id_at(ids: Sequence[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "nothing"
