"""Records of fine-tuning data: prompt and completion, or the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_slm.preprocessing.text_reader import ERROR, ONE_LINE, REPLACE, decode_text, replace_surrogates

ASSISTANT, SYSTEM = "assistant", "system"
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "function_call"), ASSISTANT),
    "system": SYSTEM,
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
KEYS = "give 'prompt' and 'completion', 'messages', 'conversations', or 'instruction' and 'output'"


@dataclass(frozen=True)
class Completion:
    """Represent a prompt and its completion, as plain text."""

    prompt: str
    completion: str

    def texts(self) -> Iterator[str]:
        """Return the texts that the user wrote."""
        return iter((self.prompt, self.completion))


@dataclass(frozen=True)
class Conversation:
    """Messages with a role and content each, of which the assistant's from ``first_answer`` on are trained.

    A message of weight 0, in OpenAI's format, is not trained.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    first_answer: int = 0

    def texts(self) -> Iterator[str]:
        """Return the texts that the user wrote, those of tool calls and tools included."""
        return _texts([self.messages, self.tools])

    def answers(self) -> list[int]:
        """Return the positions of the trained messages; messages without content or tool calls are not trained."""
        return [
            place
            for place, message in enumerate(self.messages)
            if place >= self.first_answer and message["role"] == ASSISTANT and not _is_untrained(message)
        ]


Record = Completion | Conversation


@dataclass(frozen=True)
class RecordReader:
    """Read the examples of a JSON object.

    Args:
        splits_at_system: a system message starts another conversation, as in Megatron-LM's packed lines.
        splits_at_answers: each answer is an example, whose prompt is the conversation before it.
        lone_surrogates: "error" to reject them, or "replace" to substitute U+FFFD.
    """

    splits_at_system: bool = True
    splits_at_answers: bool = False
    lone_surrogates: str = ERROR

    def __call__(self, document: bytes | dict[str, Any]) -> list[Record]:
        """Return the examples of a line of JSON or a table row; Megatron-LM's lines can contain several.

        Raises:
            ValueError, KeyError, TypeError: the document is not a record; the message contains the reason.
        """
        if isinstance(document, bytes):
            record = json.loads(decode_text(document, self.lone_surrogates))
        else:
            record = _without_nulls(document)
        if not isinstance(record, dict):
            raise TypeError("not a JSON object" + (ONE_LINE if isinstance(record, list) else ""))
        if self.lone_surrogates == REPLACE:
            record = _map_texts(record, replace_surrogates)
        for text in _texts(record):
            text.encode("utf-8")  # raises UnicodeEncodeError for lone surrogates
        return [example for found in self._records(record) for example in self._split_answers(found)]

    def _records(self, record: dict[str, Any]) -> Iterator[Record]:
        tools = _tools(record.get("tools"))
        if record.get("messages") is not None:
            yield from self._split_conversations(_messages(record["messages"], "messages"), tools)
        elif record.get("conversations") is not None:
            yield from self._split_conversations(_sharegpt_messages(record), tools)
        elif "instruction" in record and "output" in record:
            yield Conversation(_alpaca_messages(record), tools)
        elif "prompt" not in record or "completion" not in record:
            raise ValueError(f"none of the known keys: {KEYS}")
        elif isinstance(record["prompt"], list) and isinstance(record["completion"], list):
            before = _messages(record["prompt"], "prompt")
            yield Conversation(before + _messages(record["completion"], "completion"), tools, len(before))
        else:
            yield Completion(_text(record["prompt"], "prompt"), _text(record["completion"], "completion"))

    def _split_conversations(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> Iterator[Conversation]:
        starts = [0]
        if self.splits_at_system:
            starts += [place for place, message in enumerate(messages) if place and message["role"] == SYSTEM]
        for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
            yield Conversation(messages[start:stop], tools)

    def _split_answers(self, record: Record) -> list[Record]:
        if not self.splits_at_answers or isinstance(record, Completion) or not record.answers():
            return [record]
        return [
            replace(record, messages=record.messages[: place + 1], first_answer=place) for place in record.answers()
        ]


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is not a list of messages")
    return [_message(message, f"{key}[{place}]") for place, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return a message with text content; other keys, which the template may read, are kept unless null."""
    if not isinstance(message, dict):
        raise TypeError(f"{place} is not an object with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str):
        raise ValueError(f"{place} has no role")
    if content is None and not calls and not message.get("reasoning_content"):
        raise ValueError(f"{place} has neither content nor tool_calls")
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(f"{place}.weight is {message['weight']!r}, and must be 0 or 1")
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_part(part, place) for part in content)
    found = {key: value for key, value in message.items() if value is not None and key != "tool_calls"}
    if calls:
        found["tool_calls"] = _tool_calls(calls, place)
    return {**found, "role": role, "content": "" if content is None else _text(content, f"{place}.content")}


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls with arguments as objects, which templates expect; OpenAI's format has them as JSON texts."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{place}.tool_calls is not a list of objects")
    return [{key: _function(value) if key == "function" else value for key, value in call.items()} for call in calls]


def _function(function: Any) -> Any:
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


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


def _alpaca_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of Alpaca's keys; ``system`` and ``history``, pairs of texts, are LLaMA-Factory's."""
    system, history = record.get("system"), record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError("'history' is not a list of pairs")
    texts = [_text(record[key], key) for key in ("instruction", "input") if record.get(key)]
    turns = [*history, ("\n".join(texts), record["output"])]
    messages = [{"role": SYSTEM, "content": _text(system, "system")}] if system else []
    for user, assistant in turns:
        messages.append({"role": "user", "content": _text(user, "history")})
        messages.append({"role": ASSISTANT, "content": _text(assistant, "output")})
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
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a nested value with all texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(inner, change) for key, inner in value.items()}
    return [_map_texts(inner, change) for inner in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    """Return a nested value without null entries of objects: tables have all fields in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_untrained(message: dict[str, Any]) -> bool:
    is_empty = not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
    return is_empty or message.get("weight") == 0
