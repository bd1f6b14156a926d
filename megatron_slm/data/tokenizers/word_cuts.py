"""Where a text may be cut so that its parts, encoded one by one, give the ids of the whole.

A vocabulary decides it for tokenizers that merge over the whole text: no merge can cross a border between two
characters that no piece of the vocabulary holds side by side, and merges on one side of it do not depend on the other.
A pre-tokenizer decides it for the others, which never merge across pre-tokens (pretoken_cuts.py).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

SPACE = "▁"  # what sentencepiece writes for a space
DIGITS = frozenset(string.digits)
Cut = Callable[[str], list[str]]


class Uncuttable(Exception):
    """The tokenizer gives no border at which cutting is known to be exact; the message says why."""


def _never(text: str) -> bool:
    return False


@dataclass(frozen=True)
class WordCuts:
    """How to encode a text by parts: ``before``, the ids of each word of ``words(prepare(text))``, ``after``.

    The pieces of a word, where there are any, give the ids of the word in the same way. Texts of which ``whole`` is
    true are not to be cut.
    """

    words: Cut
    encode: Callable[[str], Sequence[int]]  # ids of a word or piece
    pieces: Cut | None = None
    prepare: Callable[[str], str] = str
    whole: Callable[[str], bool] = _never
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def vocabulary_cuts(merged: Sequence[str], is_known: Callable[[str], bool]) -> Cut:
    """The cut into the smallest words that no merge can cross, for texts with a space for each "▁".

    It is before runs of spaces, and between newlines, digits, marks (neither letters nor digits) and everything else,
    as far as the vocabulary keeps them apart. Longer words would be fewer, but so many more of them new that these
    are faster by a quarter on text that is not all prose.

    Args:
        merged: every string that is encoded as one id and is longer than one character.
        is_known: whether a character, encoded alone, never is (a part of) an unknown token. Two unknown tokens side by
            side can become one, so that a cut needs a known character at one side.

    Raises:
        Uncuttable: a piece with a space behind another character.
    """
    bodies = [piece.lstrip(SPACE) for piece in merged]
    for piece, body in zip(merged, bodies, strict=True):
        if SPACE in body or " " in piece:
            raise Uncuttable(f"the piece {piece!r} of the vocabulary crosses a border between words")
    if not is_known(SPACE):
        raise Uncuttable(f"the vocabulary has no {SPACE!r}")
    newline = kept_apart(filter(is_known, "\n"), bodies)
    digits = kept_apart(filter(is_known, DIGITS), bodies)
    others = {character for character in "".join([string.punctuation, *bodies]) if not character.isalnum()} - {"\n"}
    marks = kept_apart(filter(is_known, others), bodies)
    numbers = "{1,3}" if digits and not any(set(body) <= digits for body in bodies if len(body) > 1) else "+"
    groups = [(newline, "+"), (digits, numbers), (marks, "+")]
    rest = re.escape("".join(sorted(newline | digits | marks)))
    words = [f"[^ {rest}]+", *(f"[{re.escape(''.join(sorted(group)))}]{count}" for group, count in groups if group)]
    return re.compile(f" *(?:{'|'.join(words)})| +").findall


def kept_apart(candidates: Iterable[str], bodies: Iterable[str]) -> frozenset[str]:
    """The largest set of candidates that no body holds together with a character outside the set."""
    group = frozenset(candidates)
    characters = [frozenset(body) for body in bodies]
    while mixed := [found for found in characters if found & group and not found <= group]:
        group -= frozenset().union(*mixed)
    return group
