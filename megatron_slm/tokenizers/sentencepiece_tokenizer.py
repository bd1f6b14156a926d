"""SentencePiece tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import (
    TOKENS,
    Tokenizer,
    TokenizerFiles,
    fingerprint_files,
    missing_eod_error,
    require_file,
)
from megatron_slm.tokenizers.byte_lengths import ByteLengths, sentencepiece_byte_lengths
from megatron_slm.tokenizers.fast_model import SPACE, FastModel, UnsupportedTokenizer
from megatron_slm.tokenizers.sentencepiece_fast import sentencepiece_fast_model


class SentencePieceTokenizer(Tokenizer):
    """Load a SentencePiece model; its </s> ends documents.

    Control pieces that occur in a text are encoded as text or, if ``special_tokens`` is "tokens", as control pieces. In
    the latter case the text between them is encoded separately, as by Megatron-LM's --tokenizer-sentencepiece-legacy.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        import sentencepiece

        path = require_file(files.model, "--tokenizer-model", "SentencePieceTokenizer")
        super().__init__(fingerprint_files(path), f"--tokenizer-model {path}")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"--tokenizer-model {path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self.model.get_piece_size()
        self.special_ids = frozenset(filter(self.model.is_control, range(self.vocab_size)))
        eod = self.model.eos_id() if files.eod_id is None else files.eod_id
        if eod < 0 and files.eod_id is None:
            raise missing_eod_error(self.source)
        self.eod = eod
        names = {self.model.id_to_piece(token): token for token in self.special_ids}
        self.special_texts = self.added_texts = frozenset(names)
        self._specials = names if files.special_tokens == TOKENS else {}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    @property
    def bos(self) -> int | None:
        return bos if (bos := self.model.bos_id()) >= 0 else None

    def encode(self, text: str) -> list[int]:
        if not self._specials:
            return self.model.encode(text)
        ids: list[int] = []
        for place, part in enumerate(self._split(text)):
            if place % 2:
                ids.append(self._specials[part])
            elif part:
                found = self.model.encode(part)
                has_dummy_prefix = ids and found and self.model.id_to_piece(found[0]) == SPACE
                ids += found[1:] if has_dummy_prefix else found
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))

    def byte_lengths(self) -> ByteLengths:
        return sentencepiece_byte_lengths(self.model)

    def fast_model(self) -> FastModel:
        if self._specials:
            raise UnsupportedTokenizer("special tokens in texts are encoded as tokens")
        return sentencepiece_fast_model(self.model)
