"""Conversion of SentencePiece BPE models to gigatoken.

sentencepiece merges the adjacent pair whose piece has the highest score, the leftmost one in a tie. The equivalent
merge list contains every split of every piece, ordered by score. Only normal pieces are merged: a control piece such as
``<s>`` that occurs in a text remains text.

gigatoken requires an entry for every byte. For a model without byte fallback, 256 byte entries are appended to the
vocabulary: a run of their ids corresponds to characters outside the model, which sentencepiece encodes as one unknown
id.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from megatron_slm.tokenizers.fast_model import BYTES, SPACE, FastModel, UnsupportedTokenizer, overlap_probes


def sentencepiece_fast_model(model: Any) -> FastModel:
    """Convert a ``sentencepiece.SentencePieceProcessor`` to a gigatoken model.

    gigatoken performs the dummy prefix and the "▁" replacement if the model has no other normalization; otherwise
    sentencepiece normalizes each text before encoding.

    Raises:
        UnsupportedTokenizer: gigatoken is not known to produce the same ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.serialized_model_proto())
    _check(proto)
    pieces = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    symbols = [(place, p.piece) for place, p in enumerate(proto.pieces) if p.type == p.USER_DEFINED]
    merges = _merges(pieces)
    normalizer = proto.normalizer_spec
    is_native = not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or symbols)
    settings = {
        "added_tokens": [_added_token(place, piece) for place, piece in symbols],
        "normalizer": _native_normalizer(normalizer.add_dummy_prefix) if is_native else None,
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": _vocabulary(proto, pieces),
            "merges": merges,
        },
    }
    probes = [text.replace(SPACE, " ") for text in overlap_probes(merges)] + [piece for _, piece in symbols]
    return FastModel(
        settings,
        prepare=None if is_native else model.normalize,
        unknown=None if proto.trainer_spec.byte_fallback else (len(proto.pieces), model.unk_id()),
        probes=tuple(probes),
    )


def _check(proto: Any) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise UnsupportedTokenizer("the SentencePiece model is not BPE")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UnsupportedTokenizer("the SentencePiece model does not escape spaces as a ▁ prefix")
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        raise UnsupportedTokenizer("the SentencePiece model has unused pieces")
    longer = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL and len(p.piece) > 1}
    if len(set(longer.values())) < len(longer):
        raise UnsupportedTokenizer("the SentencePiece model has pieces with equal scores")
    if not set("".join(longer)) <= {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}:
        raise UnsupportedTokenizer("the SentencePiece model merges characters that are not pieces")


def _vocabulary(proto: Any, pieces: Container[str]) -> dict[str, int]:
    """Return the ids of all normal pieces and of the byte entries."""
    found = {p.piece: place for place, p in enumerate(proto.pieces) if p.piece in pieces or p.type == p.BYTE}
    if not proto.trainer_spec.byte_fallback:
        found |= {name: place for place, name in enumerate(sorted(BYTES), start=len(proto.pieces))}
    return found


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every split of every piece into two pieces, ordered by score."""
    return [
        (piece[:split], piece[split:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for split in range(1, len(piece))
        if piece[:split] in scores and piece[split:] in scores
    ]


def _native_normalizer(prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _added_token(place: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": place, "content": content, "normalized": True, **flags}
