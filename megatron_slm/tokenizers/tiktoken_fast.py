"""Conversion of tiktoken vocabularies to gigatoken.

tiktoken merges the adjacent pair whose token has the lowest rank, the leftmost one in a tie, unless the pre-token is
itself a token. The equivalent tokenizer.json contains every split of every token, ordered by rank, and sets
``ignore_merges``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_slm.tokenizers.fast_model import FastModel
from megatron_slm.tokenizers.huggingface_fast import CONTEXTS, byte_characters


def tiktoken_fast_model(ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> FastModel:
    """Convert a tiktoken vocabulary to a gigatoken model.

    Args:
        ranks: token ids, in merge order.
        specials: ids of the special tokens that are recognized in texts.
        pattern: regular expression of the pre-tokens; gigatoken rejects patterns that it does not support.
    """
    names = {token: _written(token) for token in ranks}
    merges = [
        (names[token[:split]], names[token[split:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for split in range(1, len(token))
        if token[:split] in names and token[split:] in names
    ]
    pre_split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    settings = {
        "added_tokens": list(_added_tokens(specials)),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pre_split, byte_level]},
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
    return FastModel(settings, probes=tuple(c.replace("{}", name) for name in list(specials)[:20] for c in CONTEXTS))


def _written(token: bytes) -> str:
    return "".join(map(_CHARACTERS.__getitem__, token))


def _added_tokens(specials: dict[str, int]) -> Iterable[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name, place in specials.items():
        yield {"id": place, "content": name, "special": True, **flags}


_CHARACTERS = byte_characters()
