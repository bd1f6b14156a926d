"""tiktoken vocabularies for gigatoken.

tiktoken merges the adjacent pair whose token has the lowest rank, the leftmost of equals, unless the whole pre-token is
a token. As a tokenizer.json this is every split of every token in the order of the ranks, with ``ignore_merges``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_slm.tokenizers.fast_model import FastModel
from megatron_slm.tokenizers.huggingface_fast import CONTEXTS, byte_characters


def tiktoken_fast_model(ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> FastModel:
    """Return a tiktoken vocabulary for gigatoken.

    Args:
        ranks: ids of the tokens, in the order of merging.
        specials: ids of the special tokens that are looked for in texts.
        pattern: expression of the pre-tokens. gigatoken refuses those that it does not know.
    """
    names = {token: _written(token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in names and token[cut:] in names
    ]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    settings = {
        "added_tokens": list(_added_tokens(specials)),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
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
