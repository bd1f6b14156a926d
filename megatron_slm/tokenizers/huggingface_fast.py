"""Conversion of ``tokenizers`` models to gigatoken: byte-level BPE, and BPE with byte fallback.

gigatoken ignores the parts of a tokenizer.json that it does not support. All fields are therefore validated here, and
a tokenizer with any setting that gigatoken is not known to honor is rejected.
"""

from __future__ import annotations

import json
from typing import Any

from megatron_slm.tokenizers.fast_model import (
    BYTES,
    FastModel,
    UnsupportedTokenizer,
    overlap_probes,
    unstable_under_nfc,
)

Settings = dict[str, Any]
CONTEXTS = ("{}", "a{}b", " {} ", "  {}\n{}{}", "1{}.")  # contexts in which added tokens are probed
PLAIN_BYTES = (*range(33, 127), *range(161, 173), *range(174, 256))  # written as the character of the same code


def byte_characters() -> list[str]:
    """Return the character that represents each byte in byte-level vocabularies, [256]."""
    others = iter(range(256, 512))
    return [chr(byte if byte in PLAIN_BYTES else next(others)) for byte in range(256)]


def huggingface_fast_model(model: Any) -> FastModel:
    """Convert a ``tokenizers.Tokenizer`` without truncation and padding to a gigatoken model.

    Raises:
        UnsupportedTokenizer: gigatoken is not known to produce the same ids.
    """
    settings = json.loads(model.to_str())
    before, after = _special_ids(settings.pop("post_processor"))
    names = [token["content"] for token in settings["added_tokens"]]  # all are probed: one may contain another
    if model.encode_special_tokens:  # special tokens that occur in a text remain text
        settings["added_tokens"] = [token for token in settings["added_tokens"] if not token["special"]]
    _check_model(settings["model"])
    if settings["model"].get("byte_fallback"):
        _check_byte_fallback(settings)
    else:
        _check_byte_level(settings)
    _check_added_tokens(settings)
    probes = [context.replace("{}", name) for name in names for context in CONTEXTS]
    decode = dict(zip(byte_characters(), range(256), strict=True))
    for text in overlap_probes(_pairs(settings["model"]["merges"])):
        is_bytes = not settings["model"].get("byte_fallback") and all(character in decode for character in text)
        probes.append(bytes(map(decode.__getitem__, text)).decode("utf-8", "replace") if is_bytes else text)
    avoid = unstable_under_nfc() if "NFC" in _kinds(settings["normalizer"], "normalizers") else None
    return FastModel(settings, before=before, after=after, avoid=avoid, probes=tuple(probes))


def _check_model(model: Settings) -> None:
    if model["type"] != "BPE":
        raise UnsupportedTokenizer(f"its model is {model['type']}, not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedTokenizer(f"its model has {name}")


def _check_byte_level(settings: Settings) -> None:
    steps = _steps(settings["pre_tokenizer"], "pretokenizers")
    *splits, last = steps or [{"type": "none"}]
    if last["type"] != "ByteLevel" or last["use_regex"] == bool(splits) or (splits and last["add_prefix_space"]):
        raise UnsupportedTokenizer(f"its pre-tokenizer is {_step_names(steps)}")
    if any(step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"] for step in splits):
        raise UnsupportedTokenizer(f"its pre-tokenizer is {_step_names(steps)} with unsupported settings")
    kinds = _kinds(settings["normalizer"], "normalizers")
    if kinds - {"NFC"}:
        raise UnsupportedTokenizer(f"its normalizer is {' and '.join(sorted(kinds))}")
    added = {token["content"] for token in settings["added_tokens"]}
    vocabulary = settings["model"]["vocab"].keys() - added
    if not set("".join(vocabulary)) <= set(byte_characters()):
        named = {name for name in vocabulary if not set(name) <= set(byte_characters())}
        if any(not (name.startswith("<") and name.endswith(">")) for name in named):
            raise UnsupportedTokenizer("its vocabulary contains entries that are not byte-level")


def _check_byte_fallback(settings: Settings) -> None:
    model = settings["model"]
    pairs = _pairs(model["merges"])
    if not model["vocab"].keys() >= BYTES or model.get("ignore_merges"):
        raise UnsupportedTokenizer("its byte fallback is incomplete, or ignores merges")
    if any(left in BYTES or right in BYTES or left + right in BYTES for left, right in pairs):
        raise UnsupportedTokenizer("its vocabulary merges bytes")


def _check_added_tokens(settings: Settings) -> None:
    is_changed = settings["normalizer"] is not None and not settings["model"].get("byte_fallback")
    for token in settings["added_tokens"]:
        if token["single_word"] or (token["normalized"] and is_changed):
            raise UnsupportedTokenizer(
                f"its added token {token['content']!r} is matched in normalized text or as a single word"
            )
    if any(token["lstrip"] or token["rstrip"] for token in settings["added_tokens"]):
        spaced = [
            token["content"] for token in settings["added_tokens"] if token["content"].strip() != token["content"]
        ]
        if spaced:  # libraries assign the white space between adjacent tokens differently
            raise UnsupportedTokenizer(f"its added token {spaced[0]!r} has spaces that other added tokens strip")


def _special_ids(processor: Settings | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor inserts before and after a text."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    for step in _steps(processor, "processors"):
        if step["type"] == "ByteLevel":
            continue  # it changes offsets only
        if step["type"] != "TemplateProcessing":
            raise UnsupportedTokenizer(f"its post-processor is {step['type']}")
        names = [next(iter(part.items())) for part in step["single"]]
        kinds = [kind for kind, _ in names]
        if kinds.count("Sequence") != 1:
            raise UnsupportedTokenizer("its post-processor does not contain the text exactly once")
        place = kinds.index("Sequence")
        ids = [
            tuple(step["special_tokens"][part["id"]]["ids"]) if kind == "SpecialToken" else () for kind, part in names
        ]
        before = sum(ids[:place], ()) + before
        after = after + sum(ids[place:], ())
    return before, after


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Return merges as pairs; older files write a merge as one string with a space."""
    return [(pair[0], pair[1]) for pair in (m.split(" ") if isinstance(m, str) else m for m in merges)]


def _steps(part: Settings | None, name: str) -> list[Settings]:
    """Return the flattened steps of a tokenizer.json component, which may be absent, single or a sequence."""
    if part is None:
        return []
    return [inner for step in part[name] for inner in _steps(step, name)] if part["type"] == "Sequence" else [part]


def _kinds(part: Settings | None, name: str) -> set[str]:
    return {step["type"] for step in _steps(part, name)}


def decoder_kinds(settings: Settings) -> set[str]:
    """Return the kinds of the decoder's steps."""
    return _kinds(settings["decoder"], "decoders")


def _step_names(steps: list[Settings]) -> str:
    return " and ".join(step["type"] for step in steps) or "missing"
