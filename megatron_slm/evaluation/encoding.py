"""Token sequences of evaluation requests, equal to those of lm-evaluation-harness's Hugging Face backend."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.inference.batches import ScoringRequest
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class RequestEncoder:
    """Encode texts for a model with a limited context.

    The token before a text without context is the tokenizer's beginning-of-sequence token if its files declare one, and
    the end-of-document token otherwise.
    """

    tokenizer: Tokenizer
    context_length: int  # tokens of the model's context

    @property
    def prefix(self) -> int:
        """Return the token that precedes a text without context."""
        return self.tokenizer.eod if self.tokenizer.bos is None else self.tokenizer.bos

    def continuation(self, context: str, continuation: str) -> ScoringRequest:
        """Return the request for the log-likelihood of ``continuation`` after ``context``.

        Both are encoded as one text, and the tokens beyond those of the context alone are scored. Spaces at the end of
        the context belong to the continuation. Sequences beyond the context length lose their first tokens.

        Raises:
            ConfigError: the continuation has no tokens, or more than the context length.
        """
        before, scored = self._split(context, continuation)
        if not scored:
            raise ConfigError(
                f"the continuation {continuation[:60]!r} after {context[-60:]!r} has no tokens. Remove this request."
            )
        if len(scored) > self.context_length:
            raise ConfigError(
                f"the continuation {continuation[:60]!r} has {len(scored):,} tokens, more than the model's context "
                f"length, {self.context_length:,}. Remove this request, or evaluate another model."
            )
        tokens = (before + scored)[-(self.context_length + 1) :]
        return ScoringRequest(tokens, len(tokens) - len(scored))

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of the context, at least one, and those of the continuation."""
        if not context:
            scored = self.tokenizer.encode_plain(continuation)
            return (scored[:1], scored[1:]) if scored[:1] == [self.prefix] else ([self.prefix], scored)
        text = context.rstrip()
        spaces = context[len(text) :]
        before = self.tokenizer.encode(text)
        scored = self.tokenizer.encode(text + spaces + continuation)[len(before) :]
        return before or [self.prefix], scored

    def windows(self, text: str) -> list[ScoringRequest]:
        """Return requests that score every token of a text once, each with as many tokens of context as fit.

        The first token is scored after the prefix; the last window overlaps the one before.
        """
        size = self.context_length
        tokens = [self.prefix, *self.tokenizer.encode(text)]
        requests = []
        for first in range(1, len(tokens), size):
            end = min(first + size, len(tokens))
            window = tokens[max(0, end - size - 1) : end]
            requests.append(ScoringRequest(window, len(window) - (end - first)))
        return requests

    def prompt(self, text: str, new_tokens: int) -> list[int]:
        """Return the tokens of a prompt, without the first ones if ``new_tokens`` more would not fit.

        Raises:
            ConfigError: ``new_tokens`` alone exceed the context.
        """
        room = self.context_length - new_tokens
        if room < 1:
            raise ConfigError(
                f"{new_tokens:,} new tokens do not fit into the model's context of {self.context_length:,}. Evaluate "
                "without tasks that generate text, or a model with a longer context."
            )
        return self.tokenizer.encode(text)[-room:] or [self.prefix]
