"""Conversion of generated tokens to text as they arrive."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.tokenizers.tokenizer import Tokenizer

CONTEXT = 16  # tokens of the prompt that affect the text of the next token, such as its leading space
REPLACEMENT = "\ufffd"  # decoded from bytes that are not, or not yet, a UTF-8 character


class TextStream:
    """Return the text of each new token once its characters are complete.

    The text of a token depends on the tokens before it, so that a window of tokens is decoded with and without the new
    ones. The concatenated pieces are the text of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._window = list(prompt[-CONTEXT:])
        self._returned = len(self._window)  # tokens of the window whose text has been returned
        self._known = self._decode(self._window)

    def push(self, token: int) -> str:
        """Add a token; return the new text, which is empty while its last character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._known) :]
        self._window = self._window[self._returned :]
        self._returned = len(self._window)
        self._known = self._decode(self._window)
        return new

    def finish(self) -> str:
        """Return the remaining text, in which U+FFFD replaces incomplete characters."""
        return self._decode(self._window)[len(self._known) :]
