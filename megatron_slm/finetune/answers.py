"""Text and answer spans of conversations, and their exact token ids and masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_slm.finetune.records import Completion, Conversation, Record
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.chat_template import ChatTemplate, Span, TemplateError
from megatron_slm.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """Token ids of an example, and whether each is part of an answer."""

    ids: list[int]
    mask: list[bool]


def conversation_text(
    template: ChatTemplate, conversation: Conversation, ends: Iterable[str]
) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the spans of its answers, each with its end-of-turn token.

    An answer is the text between the conversation before it, with the generation prompt, and the conversation with it,
    without white space after an end-of-turn token. Text that a template adds at the end of a conversation, such as an
    end-of-document token, is part of the last answer only. Templates with ``{% generation %}`` mark the answers
    themselves.

    Args:
        ends: texts of tokens that can end a turn.

    Raises:
        TemplateError: the template does not accept the conversation, or formats a message in a way that depends on
            later ones.
    """
    messages, tools = conversation.messages, conversation.tools
    template = template.choose(tools)
    text, marked = template.render(messages, tools)
    wanted = conversation.answers()
    if template.marks_answers:
        every = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) != len(every):
            raise TemplateError(
                f"the chat template marks {len(marked)} texts with {{% generation %}}, but the conversation has "
                f"{len(every)} messages of the assistant"
            )
        return text, [span for place, span in zip(every, marked, strict=True) if place in wanted]
    spans = []
    for place in wanted:
        before = template.render(messages[:place], tools, add_generation_prompt=True)[0]
        after = template.render(messages[: place + 1], tools)[0]
        if not text.startswith(after):
            following = template.render(messages[: place + 1], tools, add_generation_prompt=True)[0]
            after = _shared_turn(after, following, ends)
        if not after.startswith(before):
            raise TemplateError(
                f"the answer messages[{place}] cannot be located: the text of the chat template with it does not begin "
                "with the conversation before it and the generation prompt. Mark answers in the template with "
                "{% generation %} (--chat-template FILE)"
            )
        if not text.startswith(after):
            raise TemplateError(
                f"the answer messages[{place}] cannot be located: the chat template formats messages differently if "
                "others follow. Make each answer an example (--split-at-answers), or mark answers in the template with "
                "{% generation %} (--chat-template FILE)"
            )
        spans.append((len(before), len(before) + len(_turn(after[len(before) :], ends))))
    return text, spans


def _shared_turn(after: str, following: str, ends: Iterable[str]) -> str:
    """Return the start of ``after`` up to the last end-of-turn token that ``following`` also has, if there is one."""
    common = os.path.commonprefix((after, following))  # noqa: RUF071 of texts, not paths
    stop = max((common.rfind(end) + len(end) for end in ends if end in common), default=0)
    rest = common[stop:].strip()  # special tokens have common beginnings
    return common[:stop] if any(end.startswith(rest) for end in ends) else after


def _turn(text: str, ends: Iterable[str]) -> str:
    """Return a turn without white space after its end-of-turn token, which the model does not generate."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tuple(ends)) else text


class ExampleEncoder:
    """Encode records to token ids and answer masks.

    A prompt has the same ids as without its answer, as in generation: if the tokenizer would merge the end of the
    prompt and the start of the answer, they are encoded separately.

    Args:
        tokenizer: a tokenizer that encodes special tokens in texts as tokens.
        template: chat template, or the error for conversations if there is none.
        allows_special: special tokens in the contents of messages are encoded as tokens instead of being an error.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | ConfigError, *, allows_special: bool = False
    ) -> None:
        self.tokenizer, self.template, self.allows_special = tokenizer, template, allows_special

    def __call__(self, record: Record) -> Example:
        """Return the ids and the mask of a record; the mask is empty if there is no answer.

        Raises:
            ValueError: the record cannot be encoded; the message contains the reason.
            ConfigError: the record is a conversation, and there is no template.
        """
        self._refuse_special(record)
        if isinstance(record, Completion):
            text = record.prompt + record.completion
            spans = [(len(record.prompt), len(text))] if record.completion.strip() else []
            body = self.encode(text, spans)
            prefix, end = self._text_prefix, self.tokenizer.eod
            return Example([*prefix, *body.ids, end], [*(False for _ in prefix), *body.mask, bool(spans)])
        if isinstance(self.template, ConfigError):
            raise self.template
        return self.encode(*conversation_text(self.template, record, self._ends))

    def ends_turn(self, token: int) -> bool:
        """Return whether a token can end a turn."""
        return token == self.tokenizer.eod or self.tokenizer.decode([token]).strip() in self._ends

    def encode(self, text: str, spans: Sequence[Span]) -> Example:
        """Return the ids of a text and whether each lies in a span.

        Raises:
            ValueError: a span begins or ends inside of a token that cannot be divided.
        """
        bounds = [bound for span in spans for bound in span]
        ids, begin, kept = self.tokenizer.encode_plain(text), 0, 0  # text from ``begin`` is ids from ``kept``
        places = []
        complete = ids
        for bound in bounds:
            head = self._encode_part(text[begin:bound], begin)
            if ids[kept : kept + len(head)] != head:
                ids = [*ids[:kept], *head, *self._encode_part(text[bound:], bound)]
                begin, kept = bound, kept + len(head)
                places.append(kept)
            else:
                places.append(kept + len(head))
        if ids is not complete and self.tokenizer.decode(ids) != self.tokenizer.decode(complete):
            raise ValueError("an answer begins or ends inside of a token; separate it from its prompt by a newline")
        mask = [False] * len(ids)
        for start, stop in zip(places[::2], places[1::2], strict=True):
            mask[start:stop] = [True] * (stop - start)
        return Example(ids, mask)

    def _encode_part(self, text: str, begin: int) -> list[int]:
        """Return the ids of a part of a text, without the space that some tokenizers add before a text."""
        encode = self.tokenizer.encode_plain
        if begin == 0 or not self._adds_space:
            return encode(text)
        newline = encode("\n")
        return encode("\n" + text)[len(newline) :]

    @cached_property
    def _ends(self) -> frozenset[str]:
        """Texts of the tokens that can end a turn."""
        return frozenset(text for text in self.tokenizer.added_texts if text.strip())

    @cached_property
    def _adds_space(self) -> bool:
        encode = self.tokenizer.encode_plain
        return encode("\na") != encode("\n") + encode("a")

    @cached_property
    def _text_prefix(self) -> list[int]:
        """Ids that the tokenizer adds before every text, such as <s>."""
        added, plain = self.tokenizer.encode("a"), self.tokenizer.encode_plain("a")
        place = next(place for place in range(len(added)) if added[place : place + len(plain)] == plain)
        return added[:place]

    def _refuse_special(self, record: Record) -> None:
        if self.allows_special:
            return
        for text in record.texts():
            for special in self.tokenizer.special_texts:
                if special in text:
                    raise ValueError(
                        f"a text contains the special token {special!r}; remove it, or encode it as a token with "
                        "--special-tokens-in-text tokens"
                    )
