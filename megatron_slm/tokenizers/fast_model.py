"""The form in which a tokenizer is handed to gigatoken, a BPE library of another order of speed, and its limits."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MOST_PROBES = 400
SPACE = "▁"  # in SentencePiece vocabularies
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # entries of byte fallback
SplitMerges = Iterable[tuple[str, str]]


class UnsupportedTokenizer(Exception):
    """A tokenizer for which gigatoken is not known to give the same ids; the message is the reason."""


@dataclass(frozen=True)
class FastModel:
    """A tokenizer as gigatoken loads it.

    Args:
        settings: contents of a tokenizer.json.
        prepare: is applied to each text first, or None.
        before: ids put before each text.
        after: ids put after each text.
        avoid: texts with a match are left to the plain tokenizer.
        unknown: the first of 256 ids for bytes, which the tokenizer does not have, and the id that replaces each run of
            them; or None.
        probes: texts that would reveal a difference.
    """

    settings: dict[str, Any]
    prepare: Callable[[str], str] | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    avoid: re.Pattern[str] | None = None
    unknown: tuple[int, int] | None = None
    probes: tuple[str, ...] = ()

    def load(self) -> Any:
        """Return a new gigatoken tokenizer, with an empty cache.

        Raises:
            UnsupportedTokenizer: gigatoken is not installed, or refuses the settings.
        """
        try:
            from gigatoken.gigatoken_rs import load_hf_json
        except ImportError as error:
            raise UnsupportedTokenizer("the package gigatoken is not installed") from error
        try:
            return load_hf_json(self._json)
        except Exception as error:  # of several kinds, all about the settings
            raise UnsupportedTokenizer(f"gigatoken refuses it ({str(error).splitlines()[0]})") from error

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps(self.settings, ensure_ascii=False)


def overlap_probes(merges: SplitMerges) -> tuple[str, ...]:
    """Return texts in which two merges into the same token overlap, so that the result depends on their order.

    The libraries break such ties by position or by rank: for "aaa" of "a" + "aa" and "aa" + "a", the text "a" + "aa" +
    "a" has two candidates.
    """
    splits: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        splits.setdefault(left + right, []).append((left, right))
    probes: list[str] = []
    for token, found in splits.items():
        if len(found) < 2:
            continue
        for middle in sorted({right for _, right in found} & {left for left, _ in found}, reverse=True):
            probes.append(token[: -len(middle)] + token)
            if len(probes) == MOST_PROBES:
                return tuple(probes)
    return tuple(probes)


@functools.cache
def unstable_under_nfc() -> re.Pattern[str]:
    """Return a pattern for characters that libraries with tables of different Unicode versions may normalize otherwise.

    Normalization of a character never changes once it is assigned, so these are characters with a decomposition or a
    combining class that Unicode 3.2 did not have, and those that this Python does not know.
    """
    ranges = [[0x30000, 0xDFFFF], [0xE01F0, 0xEFFFF]]  # planes that are almost empty; the last two are private
    for code in range(0x80, 0x30000):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Cs", "Co") or unicodedata.ucd_3_2_0.category(character) != "Cn":
            continue
        decomposition = unicodedata.decomposition(character)
        if category == "Cn" or unicodedata.combining(character) or (decomposition and decomposition[0] != "<"):
            if ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges) + "]")
