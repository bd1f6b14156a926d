"""Where texts for a tokenizer.json may be cut: at borders of pre-tokens, which no token crosses.

A pre-tokenizer's expression matches from left to right, so that a border between two matches is also one when the text
is cut there, if no match looks beyond it. For the expressions below that holds before the last white space of a run and
what follows it: only ``\\s+(?!\\S)`` looks ahead, and it stays inside a run of white space. Every other expression and
setting goes the plain way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import regex

from megatron_slm.data.tokenizers.word_cuts import SPACE, Uncuttable, WordCuts, vocabulary_cuts

WHITE = "\\t\\n\\v\\f\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"  # Unicode's White_Space
TAIL = rf"|[{WHITE}]+(?![^{WHITE}])|[{WHITE}]"
# a space goes with what follows it
SPACE_FIRST = rf" ?[^{WHITE}]+{TAIL}"
# so does any white space but a newline; newlines may go with marks before them, so they stay with what stands before
NEWLINE_LAST = rf"[^\S\r\n\x1c-\x1f]?[^{WHITE}]+(?:[{WHITE}]*[\r\n])?|[{WHITE}]*[\r\n]{TAIL}"
# here newlines behind marks go on with slashes
SLASHES_TOO = (
    rf"[^\S\r\n\x1c-\x1f]?[^{WHITE}]+(?:[{WHITE}]*[\r\n])?(?:/[^{WHITE}]*(?:[{WHITE}]*[\r\n])?)*"
    rf"|[{WHITE}]*[\r\n]{TAIL}"
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(contractions: str, numbers: str) -> str:
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contractions}"
    second = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contractions}"
    return rf"{first}|{second}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"


def _letters(numbers: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS_OF = {
    GPT2: SPACE_FIRST,
    _letters(r"\p{N}{1,3}"): NEWLINE_LAST,  # cl100k, Llama 3
    _letters(r"\p{N}"): NEWLINE_LAST,  # Qwen 2
    _cased("", r"\p{N}"): SLASHES_TOO,  # Tekken
    _cased("", r"\p{N}{1,3}"): SLASHES_TOO,
    _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"): SLASHES_TOO,  # o200k
}
ASCII_TEXT = re.compile(r"[\t\n\r -~]*")  # on which all engines of expressions agree


def huggingface_cuts(model: Any) -> WordCuts:
    """Cuts for a ``tokenizers.Tokenizer`` without truncation and padding.

    Raises:
        Uncuttable: a setting for which cutting is not known to be exact.
    """
    import tokenizers

    settings = json.loads(model.to_str())
    if settings["model"].get("dropout"):
        raise Uncuttable("the model draws its merges at random (dropout)")
    before, after = _special_ids(settings["post_processor"])
    whole = _whole_texts(settings)
    settings["post_processor"] = None
    writes_spaces = _is_metaspace(settings) or _is_llama_2(settings)
    words, pieces, prefix = _cuts_of(settings)
    inner = tokenizers.Tokenizer.from_str(json.dumps(settings))

    def prepare(text: str) -> str:
        return prefix(text.replace(SPACE, " ") if writes_spaces else text)

    def encode(word: str) -> Sequence[int]:
        return inner.encode(word, add_special_tokens=False).ids

    return WordCuts(words, encode, pieces, prepare, whole, before, after)


Settings = dict[str, Any]
Prefix = Callable[[str], str]


def _cuts_of(settings: Settings) -> tuple[Any, Any, Prefix]:
    """Words, pieces and what is put before a text; ``settings`` are changed to those without it."""
    steps = _steps(settings["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        prefix = _space_first if steps[0]["add_prefix_space"] else str
        steps[0]["add_prefix_space"] = False
        return _words_of(GPT2), _pieces_of(GPT2), prefix
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
        pattern = steps[0]["pattern"].get("Regex")
        if steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return _words_of(pattern), _pieces_of(pattern), str
    if _is_metaspace(settings):
        prefix = str if steps[0]["prepend_scheme"] == "never" else _space_first
        steps[0]["prepend_scheme"] = "never"
        return re.compile(" [^ ]*|[^ ]+").findall, None, prefix
    if _is_llama_2(settings):
        return _llama_2_cuts(settings)
    raise Uncuttable(f"the pre-tokenizer {' and '.join(kinds) or 'none'} is not known")


def _llama_2_cuts(settings: Settings) -> tuple[Any, Any, Prefix]:
    model = settings["model"]
    if model["type"] != "BPE" or model.get("ignore_merges") or model.get("continuing_subword_prefix"):
        raise Uncuttable("without a pre-tokenizer, only plain BPE is exact when cut")
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if not model.get("byte_fallback") or not fallback <= model["vocab"].keys():
        raise Uncuttable("unknown characters may become one token across a cut (no byte fallback)")
    if model.get("end_of_word_suffix") or any(fallback & set(pair) for pair in pairs):
        raise Uncuttable("merges of bytes, or at the end of the text, depend on what stands around them")
    words = vocabulary_cuts(["".join(pair) for pair in pairs], lambda character: True)
    prepends = any(step["type"] == "Prepend" for step in _steps(settings["normalizer"], "normalizers"))
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return words, None, (lambda text: " " + text) if prepends else str


def _is_metaspace(settings: Settings) -> bool:
    """Whether a pre-tokenizer writes spaces as "▁" and cuts before each."""
    steps = _steps(settings["pre_tokenizer"], "pretokenizers")
    return (
        [step["type"] for step in steps] == ["Metaspace"]
        and steps[0]["replacement"] == SPACE
        and bool(steps[0]["split"])
    )


def _is_llama_2(settings: Settings) -> bool:
    """Whether normalizers write spaces as "▁", and no pre-tokenizer cuts (or only one that finds no space then)."""
    steps = _steps(settings["pre_tokenizer"], "pretokenizers")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = _steps(settings["normalizer"], "normalizers")
    finds_none = all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps)
    return finds_none and normalizers in ([replaces], [{"type": "Prepend", "prepend": SPACE}, replaces])


def _whole_texts(settings: Settings) -> Callable[[str], bool]:
    """Texts that go the plain way: empty, with added tokens in them, or that the normalizer changes too deeply."""
    added = settings["added_tokens"]
    holds_any = _holds_any([token["content"] for token in added])
    normalizers = _steps(settings["normalizer"], "normalizers")
    kinds = {step["type"] for step in normalizers}
    if not kinds or _is_llama_2(settings):
        if kinds and any({" ", SPACE} & set(token["content"]) for token in added if token["normalized"]):
            raise Uncuttable("an added token with a space is looked for in the text with each space written as ▁")
        return lambda text: not text or holds_any(text)
    if not kinds <= {"NFC", "NFD"}:
        raise Uncuttable(f"the normalizer {' and '.join(sorted(kinds))} may change a text across a cut")
    # composed and decomposed forms do not cross white space; but normalizing can make an added token
    if any(token["normalized"] for token in added):
        return lambda text: not text or not text.isascii() or holds_any(text)
    return lambda text: not text or holds_any(text)


def _special_ids(processor: Settings | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the post-processor puts before and after a text."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    for step in _steps(processor, "processors"):
        if step["type"] == "ByteLevel":
            continue  # it changes offsets only
        if step["type"] != "TemplateProcessing":
            raise Uncuttable(f"the post-processor {step['type']} is not known")
        names = [next(iter(part.items())) for part in step["single"]]
        place = [kind for kind, _ in names].index("Sequence")
        ids = [
            tuple(step["special_tokens"][part["id"]]["ids"]) if kind == "SpecialToken" else () for kind, part in names
        ]
        before = sum(ids[:place], ()) + before
        after = after + sum(ids[place:], ())
    return before, after


def _steps(part: Settings | None, name: str) -> list[Settings]:
    """The steps of a part of a tokenizer.json, whether it is one, a sequence, or none."""
    if part is None:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def _words_of(pattern: str | None) -> Any:
    if pattern not in WORDS_OF:
        raise Uncuttable(f"the pre-tokenizer's expression {pattern!r} is not known")
    return re.compile(WORDS_OF[pattern]).findall


def _pieces_of(pattern: str) -> Any:
    pretokens = regex.compile(pattern).findall
    return lambda word: pretokens(word) if ASCII_TEXT.fullmatch(word) else [word]


def _holds_any(contents: Sequence[str]) -> Callable[[str], bool]:
    if not contents:
        return lambda text: False
    search = re.compile("|".join(map(re.escape, contents))).search
    return lambda text: search(text) is not None


def _space_first(text: str) -> str:
    return text if text.startswith(" ") else " " + text
