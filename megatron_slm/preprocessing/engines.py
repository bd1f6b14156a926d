"""Batch encoding engines: gigatoken if it reproduces the tokenizer's ids, otherwise the tokenizer's library."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import psutil
import pyarrow as pa

from megatron_slm.preprocessing.texts import text_offsets
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import Tokenizer
from megatron_slm.tokenizers.fast_model import FastModel, UnsupportedTokenizer

DENSE = 16  # batches 0, 1, 2, 4 and 8 are sampled, then every 16th
FIRST_SAMPLE = 24  # texts compared in the first batch; later samples compare one
SAMPLED_CHARACTERS = 2000  # characters compared per text: the plain tokenizer may be 100 times slower
MAX_CACHE = 128 << 20  # bytes of cache after which gigatoken is reloaded; the peak is twice that, as the cache doubles
MAX_ID = 1 << 24  # gigatoken allocates 16 bytes per id, and aborts the process if the allocation fails
SHOWN = 60  # characters of a text quoted in a message
PROBES = (
    *("", " ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", " \n", "\n  \n", "\0", "\x1c", "\x85", "\xa0", "\u2028"),
    *("a", " a", "a ", "a  b", "a\n\nb", "\n\n  a", "a\tb", "\t\ta", "▁", "▁▁a", "e\u0301", "\u0301", "'s", "'LL x"),
    *("12345", "x1y22z333", "٣٤²½", "日本語中文", "한국어", "ไทย العربية", "👩🏽‍🚀 🇩🇪"),
    *("\ufeffa", "\ufffd", "\U0010ffff", "\ue000"),
    *("foo.bar(baz);\n\t// x", "if (a!=b) { return c[0]; }  \n\n\n", "<s></s><unk><|endoftext|><0x0A>", "ﬁ Å ſ İ ς"),
    *("a" * 300, " " * 300, "\n" * 50, "ab" * 100, "=" * 80, "The quick brown fox\njumps over 13 lazy dogs.\r\n"),
)


class Engine(Protocol):
    """Interface of batch encoders."""

    name: str

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch of texts.

        Returns:
            the concatenated ids, [tokens] of the corpus dtype, and the tokens of each text, [texts] int64.

        Raises:
            ConfigError: the engine detected a wrong result.
            ValueError, OverflowError: a text cannot be encoded.
        """
        ...


def build_engine(tokenizer: Tokenizer, dtype: np.dtype, use_gigatoken: bool = True) -> tuple[Engine, str]:
    """Return the fastest engine that reproduces the tokenizer's ids, and the reason if gigatoken cannot be used."""
    plain = PlainEngine(tokenizer, dtype)
    if not use_gigatoken:
        return plain, ""
    if tokenizer.vocab_size > MAX_ID:
        return plain, f"its highest id is {tokenizer.vocab_size - 1}, and gigatoken allocates an entry for each id"
    try:
        return GigatokenEngine(tokenizer, tokenizer.fast_model(), dtype), ""
    except UnsupportedTokenizer as reason:
        return plain, str(reason)


class PlainEngine:
    """Encode text by text with the tokenizer's library."""

    name = "plain"

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        ids = [self._encode_one(text) for text in texts.to_pylist()]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.concatenate([np.empty(0, self.dtype), *ids]), lengths

    def _encode_one(self, text: str) -> np.ndarray:
        ids = np.array(self.tokenizer.encode(text), np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() <= np.iinfo(self.dtype).max:
            raise OverflowError(f"{ids.max() if ids.min() >= 0 else ids.min()}, stored as {self.dtype}")
        return ids.astype(self.dtype)


class GigatokenEngine:
    """Encode batches with gigatoken, verify samples against the plain tokenizer, and bound the cache.

    Raises:
        UnsupportedTokenizer: gigatoken rejects the tokenizer, or produces other ids for a probe.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, model: FastModel, dtype: np.dtype) -> None:
        self.tokenizer, self.model, self.dtype = tokenizer, model, dtype
        self.plain = PlainEngine(tokenizer, dtype)
        self.gigatoken = model.load()
        self.batches = 0
        self.max_memory: int | None = None  # bytes of resident memory; set by the first batch, after the fork
        self.rng = random.Random(0)
        if (found := self._difference([*PROBES, *model.probes])) is not None:
            raise UnsupportedTokenizer(f"gigatoken produces other ids for {found[0][:SHOWN]!r}")

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        if self.max_memory is None:
            self.max_memory = _resident_bytes() + MAX_CACHE
        encoded = self._encode(texts)
        self._compare_sample(texts)
        self._bound_cache()
        return encoded

    def _encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        if self.model.prepare is not None:
            texts = pa.array(map(self.model.prepare, texts.to_pylist()), pa.large_string())
        if self.model.avoid is not None and self.model.avoid.search(_joined(texts)):
            return self._encode_apart(texts)
        ids, lengths = self._encode_batch(texts)
        return _surrounded(ids, lengths, self.model.before, self.model.after)

    def _encode_batch(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        if not len(texts):
            return np.empty(0, self.dtype), np.empty(0, np.int64)
        layout = self.gigatoken.encode_batch(_as_awkward(texts), parallel=False).layout
        lengths = np.diff(np.asarray(layout.offsets.data)).astype(np.int64, copy=False)
        ids = np.asarray(layout.content.data)[: int(lengths.sum())]
        if self.model.unknown is not None:
            ids, lengths = _with_unknown(ids, lengths, *self.model.unknown)
        if ids.size and (most := int(ids.max())) >= self.tokenizer.vocab_size:
            raise ConfigError(
                f"{self.tokenizer.source}: gigatoken produced the id {most}, outside the vocabulary. Run with "
                "--no-use-gigatoken."
            )
        return ids.astype(self.dtype), lengths

    def _encode_apart(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts that match ``avoid`` with the plain tokenizer, and the others with gigatoken."""
        assert self.model.avoid is not None, "called only for models with a pattern to avoid"
        parts = []
        for place, text in enumerate(texts.to_pylist()):
            one = texts.slice(place, 1)
            if self.model.avoid.search(text):
                parts.append(self.plain.encode(one))
            else:
                parts.append(_surrounded(*self._encode_batch(one), self.model.before, self.model.after))
        ids, lengths = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def _compare_sample(self, texts: pa.LargeStringArray) -> None:
        number, self.batches = self.batches, self.batches + 1
        is_due = number & (number - 1) == 0 if number < DENSE else number % DENSE == 0
        if not is_due or not len(texts):
            return
        places = np.linspace(0, len(texts) - 1, min(len(texts), 1 if number else FIRST_SAMPLE)).astype(int)
        if (found := self._difference([self._excerpt(texts[place].as_py()) for place in places.tolist()])) is not None:
            raise ConfigError(self._explained(*found))

    def _excerpt(self, text: str) -> str:
        begin = self.rng.randint(0, max(0, len(text) - SAMPLED_CHARACTERS))
        return text[begin : begin + SAMPLED_CHARACTERS]

    def _difference(self, batch: Sequence[str]) -> tuple[str, list[int], list[int]] | None:
        """Return the first text with different ids, gigatoken's ids, and the plain tokenizer's; None if all agree."""
        texts = pa.array(batch, pa.large_string())
        ids, lengths = self._encode(texts)
        found = np.split(ids, np.cumsum(lengths)[:-1])
        for text, got in zip(batch, found, strict=True):
            wanted = self.plain.encode(pa.array([text], pa.large_string()))[0]
            if not np.array_equal(got, wanted):
                return text, got.tolist(), wanted.tolist()
        return None

    def _explained(self, text: str, got: list[int], wanted: list[int]) -> str:
        shared = min(len(got), len(wanted))
        place = next((i for i in range(shared) if got[i] != wanted[i]), shared)
        return (
            f"{self.tokenizer.source}: gigatoken produces other ids than the tokenizer. The first difference is at "
            f"token {place} ({_id_at(got, place)} instead of {_id_at(wanted, place)}), after "
            f"{self.tokenizer.decode(wanted[:place])[-SHOWN:]!r}, in a text that starts with {text[:SHOWN]!r}. No "
            "corpus was written. Run with --no-use-gigatoken, and please report this with the tokenizer and the text."
        )

    def _bound_cache(self) -> None:
        """Reload gigatoken when its cache, which never shrinks, exceeds the limit."""
        if self.max_memory is not None and _resident_bytes() > self.max_memory:
            self.gigatoken = None  # free the old cache before loading
            self.gigatoken = self.model.load()
            self.max_memory = _resident_bytes() + MAX_CACHE


def _with_unknown(ids: np.ndarray, lengths: np.ndarray, first: int, unknown: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace each run of ids >= ``first`` within a text by a single id ``unknown``."""
    is_unknown = ids >= first
    if not is_unknown.any():
        return ids, lengths
    continues = np.zeros(len(ids), bool)
    continues[1:] = is_unknown[1:] & is_unknown[:-1]
    ends = np.cumsum(lengths)
    continues[(ends - lengths)[lengths > 0]] = False  # runs do not cross texts
    kept = np.concatenate([[0], np.cumsum(~continues)])
    return np.where(is_unknown, unknown, ids)[~continues], kept[ends] - kept[ends - lengths]


def _surrounded(
    ids: np.ndarray, lengths: np.ndarray, before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Insert the ids ``before`` and ``after`` around each text."""
    if not (before or after):
        return ids, lengths
    ends = np.cumsum(lengths)
    places = np.stack([ends - lengths] * len(before) + [ends] * len(after), axis=1).ravel()
    added = np.tile(np.array([*before, *after], ids.dtype), len(lengths))
    return np.insert(ids, places, added), lengths + len(before) + len(after)


def _as_awkward(texts: pa.LargeStringArray) -> Any:
    """Return the texts as an awkward Array that shares their memory; gigatoken reads it without an object per text."""
    import awkward as ak

    data, offsets = texts.buffers()[2], text_offsets(texts)
    content = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    characters = ak.contents.NumpyArray(content, parameters={"__array__": "char"})
    return ak.Array(
        ak.contents.ListOffsetArray(ak.index.Index64(offsets), characters, parameters={"__array__": "string"})
    )


def _joined(texts: pa.LargeStringArray) -> str:
    data, offsets = texts.buffers()[2], text_offsets(texts)
    if data is None:
        return ""
    content = data[int(offsets[0]) : int(offsets[-1])].to_pybytes()
    return "" if content.isascii() else content.decode("utf-8")


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _id_at(ids: Sequence[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "nothing"
