"""Prompts from the command line and from JSON lines, and JSON lines of their continuations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.inference.generation import Generation, encode_prompt
from megatron_slm.inference.model import InferenceModel
from megatron_slm.inference.sampling import Decoding
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError, read_error, refuse
from megatron_slm.runtime.files import check_regular, check_replaceable, write_text

INPUT, OUTPUT = "--input", "--output"
PROMPT, TEXT = "prompt", "text"  # keys
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Prompt:
    """A prompt, its place for messages, and the other keys of its line."""

    text: str
    place: str  # "--prompt 1" or "FILE:12"
    record: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str) -> list[Prompt]:
    """Return the prompts of a file of JSON lines. Blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or lines are not objects with a text under "prompt".
    """
    try:
        check_regular(Path(path))
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise read_error(INPUT, path, error) from error
    prompts, problems = list[Prompt](), list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            prompts.append(_read_line(line, place))
        except (ValueError, TypeError, RecursionError) as error:
            problems.append(f"{INPUT}: {place}: {_describe(error)}")
    _refuse_some(problems)
    if not prompts:
        raise ConfigError(f'{INPUT} {path} holds no prompt. Write one JSON object per line: {{"prompt": "text"}}.')
    return prompts


def _read_line(line: bytes, place: str) -> Prompt:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise TypeError('not a JSON object; write {"prompt": "text"}')
    if PROMPT not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise TypeError(f"the key {PROMPT!r} is missing (keys: {keys})")
    text = record[PROMPT]
    if not isinstance(text, str):
        raise TypeError(f"the value of {PROMPT!r} is not a string")
    text.encode("utf-8")
    return Prompt(text, place, record)


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    if isinstance(error, UnicodeEncodeError):
        return f"the value of {PROMPT!r} has a lone surrogate, which is not valid text"
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


def check_output(path: str) -> None:
    """Raise ConfigError if the output file exists and holds something else, or its directory does not exist."""
    check_replaceable(path, OUTPUT, is_ours=is_output)
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"{OUTPUT} {path}: the directory {Path(path).parent} does not exist. Create it.")


def is_output(path: Path) -> bool:
    """Return whether a file is empty or begins with a line of generated text."""
    try:
        with path.open("rb") as file:
            line = file.readline()
        return not line or {PROMPT, TEXT} <= json.loads(line).keys()
    except (ValueError, AttributeError):
        return False


def write_output(path: str, prompts: Iterable[Prompt], generations: Iterable[Generation]) -> None:
    """Write one JSON line per prompt: its other keys, the prompt, and the generated text.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = (
        json.dumps({**prompt.record, PROMPT: prompt.text, TEXT: generation.text}, ensure_ascii=False)
        for prompt, generation in zip(prompts, generations, strict=True)
    )
    write_text(path, "".join(f"{line}\n" for line in lines), OUTPUT, is_ours=is_output)
