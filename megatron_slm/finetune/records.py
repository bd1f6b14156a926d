"""Records of fine-tuning data: prompt and completion, or the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ASSISTANT, SYSTEM = "assistant", "system"
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), ASSISTANT),
    "system": SYSTEM,
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
KEYS = "give 'prompt' and 'completion', 'messages', or 'conversations'"


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, as plain text."""

    prompt: str
    completion: str

    def texts(self) -> list[str]:
        """Return the texts that the user wrote."""
        return [self.prompt, self.completion]


@dataclass(frozen=True)
class Conversation:
    """Messages with a role and content each, of which the assistant's from ``first_answer`` on are trained."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_answer: int = 0

    def texts(self) -> list[str]:
        """Return the texts that the user wrote."""
        return [message["content"] for message in self.messages]

    def answers(self) -> list[int]:
        """Return the positions of the trained messages; messages without content or tool calls are not trained."""
        return [
            place
            for place, message in enumerate(self.messages)
            if place >= self.first_answer and message["role"] == ASSISTANT and not _is_empty(message)
        ]


Record = Completion | Conversation


@dataclass(frozen=True)
class RecordReader:
    """Read the examples of a JSON object.

    Args:
        splits_at_system: a system message starts another conversation, as in Megatron-LM's packed lines.
    """

    splits_at_system: bool = True
    keys: tuple[str, ...] = field(default=("prompt", "completion", "messages", "conversations"), init=False)

    def __call__(self, line: bytes) -> list[Record]:
        """Return the examples of a line; Megatron-LM's lines can contain several.

        Raises:
            ValueError, KeyError, TypeError: the line is not a record; the message contains the reason.
        """
        record = json.loads(line.decode("utf-8"))
        if not isinstance(record, dict):
            raise TypeError("not a JSON object")
        tools = _tools(record.get("tools"))
        if record.get("messages") is not None:
            return list(self._split(_messages(record["messages"], "messages"), tools))
        if record.get("conversations") is not None:
            return list(self._split(_sharegpt_messages(record), tools))
        if "prompt" not in record or "completion" not in record:
            raise ValueError(f"none of the known keys: {KEYS}")
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            before = _messages(prompt, "prompt")
            return [Conversation(before + _messages(completion, "completion"), tools, len(before))]
        return [Completion(_text(prompt, "prompt"), _text(completion, "completion"))]

    def _split(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Iterator[Conversation]:
        starts = [0]
        if self.splits_at_system:
            starts += [place for place, message in enumerate(messages) if place and message["role"] == SYSTEM]
        for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
            yield Conversation(messages[start:stop], tools)


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is not a list of messages")
    return [_message(message, f"{key}[{place}]") for place, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return a message with text content; other keys, which the template may read, are kept."""
    if not isinstance(message, dict):
        raise TypeError(f"{place} is not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"{place} has no role")
    if content is None:
        if not message.get("tool_calls"):
            raise ValueError(f"{place} has neither content nor tool_calls")
        return {**message, "role": role, "content": ""}
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_part(part, place) for part in content)
    return {**message, "role": role, "content": _text(content, f"{place}.content")}


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise ValueError(f"{place}.content has a part that is not text")
    return _text(part.get("text"), f"{place}.content")


def _sharegpt_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("'conversations' is not a list of turns")
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _messages(turns, "conversations")
    system = record.get("system")
    messages = [] if not system else [{"role": SYSTEM, "content": _text(system, "system")}]
    for number, turn in enumerate(turns):
        place = f"conversations[{number}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise ValueError(f"{place} is not an object with 'from' and 'value'")
        role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise ValueError(f"{place} is from {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": _text(turn["value"], f"{place}.value")})
    return messages


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if value is not None and not isinstance(value, list):
        raise ValueError("'tools' is not a list")
    return value or None


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{place} is not a string")
    value.encode("utf-8")  # raises UnicodeEncodeError for lone surrogates
    return value


def _is_empty(message: dict[str, Any]) -> bool:
    return not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content")
