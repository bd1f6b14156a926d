"""Where texts for a sentencepiece model may be cut: checked on the model's own settings and vocabulary.

Exact for BPE: merges are chosen by score and then from the left, so that what happens on one side of a border which no
piece crosses does not depend on the other side. Not for unigram models: sentencepiece adds their scores up in 32-bit
floats along the whole text, and the rounding of a long sum decides near ties by what stands before.
"""

from __future__ import annotations

from typing import Any

from megatron_slm.data.tokenizers.word_cuts import SPACE, Uncuttable, WordCuts, vocabulary_cuts


def sentencepiece_cuts(model: Any) -> WordCuts:
    """Cuts for a ``sentencepiece.SentencePieceProcessor``.

    Raises:
        Uncuttable: a model for which cutting is not known to be exact.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.serialized_model_proto())
    pieces = _merged_pieces(proto)
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise Uncuttable("the model writes spaces in a way of its own")
    as_it_stands = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    prefix = " " if normalizer.add_dummy_prefix else ""

    normalizer.Clear()
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    for field in ("self_test_data", "denormalizer_spec"):  # of the model with its normalizer
        if field in proto.DESCRIPTOR.fields_by_name:
            proto.ClearField(field)
    inner = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    alone = {piece.piece for piece in proto.pieces if piece.type != piece.CONTROL and len(piece.piece) == 1}
    everything_is_known = proto.trainer_spec.byte_fallback
    words = vocabulary_cuts(pieces, lambda character: everything_is_known or character in alone)

    def prepare(text: str) -> str:
        return (prefix + text).replace(SPACE, " ") if text else text

    def normalize(text: str) -> str:
        return model.normalize(text).replace(SPACE, " ")

    return WordCuts(words, inner.encode_as_ids, prepare=prepare if as_it_stands else normalize)


def _merged_pieces(proto: Any) -> list[str]:
    """The pieces that stand for more than one character, after the checks that need no more than their types."""
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise Uncuttable("only BPE models of sentencepiece are exact when cut")
    for piece in proto.pieces:
        if piece.type == piece.UNUSED:
            raise Uncuttable(f"the piece {piece.piece!r} is unused, and is split by what stands elsewhere in the text")
        if piece.type == piece.CONTROL and len(piece.piece) == 1:
            raise Uncuttable(f"the control symbol {piece.piece!r} is a character that text can hold")
    return [p.piece for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED) and len(p.piece) > 1]
