"""Representation of a tokenizer for gigatoken, a BPE library that is orders of magnitude faster, and its limits."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_PROBES = 400
SPACE = "▁"  # in SentencePiece vocabularies
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # entries of byte fallback
SplitMerges = Iterable[tuple[str, str]]


class UnsupportedTokenizer(Exception):
    """Raised if gigatoken is not known to produce the same ids as the tokenizer; the message is the reason."""


@dataclass(frozen=True)
class FastModel:
    """Hold a tokenizer in the form that gigatoken loads.

    Args:
        settings: contents of a tokenizer.json.
        prepare: function applied to each text before encoding, or None.
        before: ids inserted before each text.
        after: ids inserted after each text.
        avoid: pattern of texts that the plain tokenizer must encode instead.
        unknown: first of 256 added byte ids that the tokenizer itself does not have, and the id that replaces each run
            of them; or None.
        probes: texts likely to reveal a difference from the tokenizer.
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
            UnsupportedTokenizer: gigatoken is not installed, or rejects the settings.
        """
        try:
            from gigatoken.gigatoken_rs import load_hf_json
        except ImportError as error:
            raise UnsupportedTokenizer("the package gigatoken is not installed") from error
        try:
            return load_hf_json(self._json)
        except Exception as error:  # of several kinds, all about the settings
            raise UnsupportedTokenizer(f"gigatoken rejects it ({str(error).splitlines()[0]})") from error

    @functools.cached_property
    def _json(self) -> str:
        return json.dumps(self.settings, ensure_ascii=False)


def overlap_probes(merges: SplitMerges) -> tuple[str, ...]:
    """Return texts in which two merges into the same token overlap, so that the result depends on the tie-breaking.

    Libraries break such ties by position or by rank: if "aaa" is both "a" + "aa" and "aa" + "a", the text "a" + "aa" +
    "a" has two candidate merges.
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
            if len(probes) == MAX_PROBES:
                return tuple(probes)
    return tuple(probes)


@functools.cache
def unstable_under_nfc() -> re.Pattern[str]:
    """Return a pattern of the characters whose NFC normalization may depend on a library's Unicode version.

    Normalization of a character never changes once it is assigned. The pattern therefore contains characters with a
    decomposition or combining class that are newer than Unicode 3.2, and characters unassigned in this Python.
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
