"""Prompts from the command line and from JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.inference.generation import encode_prompt
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.sampling import Decoding
from megatron_slm.preprocessing.inputs import BYTE_ORDER_MARK, DamagedFile, check_encoding
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError, read_error, refuse
from megatron_slm.runtime.files import check_regular

INPUT = "--input"
STDIN = "-"
PROMPT = "prompt"  # key
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Prompt:
    """Represent a prompt, its place for messages, and all keys of its line."""

    text: str
    place: str  # "--prompt number 1" or "FILE:12"
    record: dict[str, Any]


def read_prompts(path: str, key: str = PROMPT) -> list[Prompt]:
    """Return the prompts of a file of JSON lines, or of standard input for ``-``. Blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or lines are not objects with a text under ``key``.
    """
    lines = read_input(path).split(b"\n")
    prompts, problems = list[Prompt](), list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            prompts.append(_read_line(line, place, key))
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(f"{INPUT}: {place}: {_describe(error, key)}")
    _refuse_some(problems)
    if not prompts:
        raise ConfigError(f'{INPUT} {path} holds no {key}. Write one JSON object per line: {{"{key}": "text"}}.')
    return prompts


def read_input(path: str) -> bytes:
    """Return the content of a file, or of standard input for ``-``, without a byte order mark.

    Raises:
        ConfigError: the file cannot be read, or starts with the mark of another encoding or of a packed format.
    """
    try:
        if path == STDIN:
            content = b"" if sys.stdin is None else sys.stdin.buffer.read()
        else:
            check_regular(Path(path))
            content = Path(path).read_bytes()
    except OSError as error:
        raise read_error(INPUT, path, error) from error
    try:
        check_encoding(content, remedy="Unpack it")
    except DamagedFile as error:
        raise ConfigError(f"{INPUT} {path} is {error}.") from error
    return content.removeprefix(BYTE_ORDER_MARK)


def _read_line(line: bytes, place: str, key: str) -> Prompt:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise TypeError(f'not a JSON object; write {{"{key}": "text"}}')
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise TypeError(f"the key {key!r} is missing (keys: {keys})")
    text = record[key]
    if not isinstance(text, str):
        raise TypeError(f"the value of {key!r} is not a string")
    text.encode("utf-8")
    return Prompt(text, place, record)


def _describe(error: Exception, key: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    if isinstance(error, UnicodeEncodeError):
        return f"the value of {key!r} has a lone surrogate, which is not valid text"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return "JSON nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refuse_some(problems: list[str]) -> None:
    """Raise one ConfigError with the first problems, if there are any."""
    hidden = len(problems) - SHOWN_PROBLEMS
    refuse(problems[:SHOWN_PROBLEMS] + ([f"{hidden} more"] if hidden > 0 else []))


def encode_prompts(prompts: Sequence[Prompt], model: InferenceModel, decoding: Decoding) -> list[list[int]]:
    """Return the tokens of all prompts.

    Raises:
        ConfigError: the tokenizer refuses a prompt, or a prompt leaves no room for a new token.
    """
    encoded, problems = list[list[int]](), list[str]()
    for prompt in prompts:
        try:
            ids = encode_prompt(model.tokenizer, prompt.text)
        except ValueError as error:
            problems.append(f"{prompt.place}: {error}")
            continue
        if len(ids) >= model.context_length:
            problems.append(
                f"{prompt.place}: the prompt has {len(ids):,} tokens, and the model {model.context_length:,} positions "
                "(--max-position-embeddings), at least one of which must be free. Shorten the prompt."
            )
        encoded.append(ids)
    _refuse_some(problems)
    limited = sum(len(ids) + decoding.max_new_tokens > model.context_length for ids in encoded)
    if limited:
        notice(
            f"{limited:,} of {len(encoded):,} prompts with --max-new-tokens {decoding.max_new_tokens:,} exceed the "
            f"{model.context_length:,} positions of the model (--max-position-embeddings); their texts end there."
        )
    return encoded
