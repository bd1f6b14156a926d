"""Categories of tokens by their text: digits, punctuation, whitespace, words, code."""

from __future__ import annotations

import unicodedata

CATEGORIES = ("words", "digits", "punctuation", "whitespace", "code", "other")
WORD_MARKS = "'’-"  # within words


def categorize(text: str) -> str:
    """Return the category of a token's text.

    "words" has letters only, apart from apostrophes and hyphens; "code" has symbols (such as + and =) or mixes letters,
    digits and punctuation; "other" is a special token, or a part of a character.
    """
    stripped = text.strip()
    if not text or "\ufffd" in text:
        return "other"
    if not stripped:
        return "whitespace"
    kinds = {unicodedata.category(character)[0] for character in stripped}  # L, M, N, P, S, Z, C
    if kinds == {"N"}:
        return "digits"
    if kinds == {"P"}:
        return "punctuation"
    if "L" in kinds and all(unicodedata.category(c)[0] in "LMZ" or c in WORD_MARKS for c in stripped):
        return "words"
    return "other" if kinds <= {"C", "M", "Z"} else "code"
