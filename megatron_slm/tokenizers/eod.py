"""End-of-document and beginning-of-sequence tokens that the files beside a ``tokenizer.json`` declare."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_slm.runtime.errors import ConfigError

USUAL_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
GENERATION = "generation_config.json"
REMEDY = "Set its id with --eod-id."


def find_eod(path: Path, token_to_id: Callable[[str], int | None]) -> int:
    """Return the id of the end-of-document token.

    Sources in order of precedence: ``eos_token``, then ``sep_token``, of ``tokenizer_config.json``; the same fields of
    ``special_tokens_map.json``; ``eos_token_id`` of ``generation_config.json``; the only one of :data:`USUAL_NAMES`
    in the vocabulary.

    Args:
        path: path of ``tokenizer.json``.
        token_to_id: function from a token to its id, or to None if the vocabulary does not contain it.

    Raises:
        ConfigError: a file cannot be read, the declared token is not in the vocabulary, or there is no candidate or
            more than one.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json_settings(path.with_name(name))
        for key in ("eos_token", "sep_token"):
            if (content := _content(settings.get(key), path.with_name(name), key)) is not None:
                return _known(content, token_to_id, path.with_name(name), key)
    ids, place = find_ends(path), f"{path.with_name(GENERATION)}: eos_token_id"
    if not ids:
        place = f"--tokenizer-model {path} without a declared eos_token"
        ids = [token for name in USUAL_NAMES if (token := token_to_id(name)) is not None]
    if len(set(ids)) > 1:
        raise ConfigError(f"{place}: ambiguous end-of-document id ({', '.join(map(str, ids))}). {REMEDY}")
    if not ids:
        raise ConfigError(
            f"--tokenizer-model {path} has no end-of-document token (no eos_token in tokenizer_config.json, and none "
            f"of {', '.join(USUAL_NAMES)} in the vocabulary). {REMEDY}"
        )
    return ids[0]


def find_ends(path: Path) -> list[int]:
    """Return the ids that ``eos_token_id`` of ``generation_config.json`` declares, of tokens that end generated texts.

    Raises:
        ConfigError: the file cannot be read, or declares something else.
    """
    declared = json_settings(path.with_name(GENERATION)).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(
            f"{path.with_name(GENERATION)}: eos_token_id is {declared!r}, but must be an id or a list of ids. {REMEDY}"
        )
    return ids


def find_bos(path: Path, token_to_id: Callable[[str], int | None]) -> int | None:
    """Return the id of the declared beginning-of-sequence token, or None if none is declared.

    Sources in order of precedence: ``bos_token`` of ``tokenizer_config.json`` and of ``special_tokens_map.json``.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json_settings(path.with_name(name)).get("bos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            return token_to_id(content)
    return None


def json_settings(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file, or an empty dict if the file does not exist.

    Raises:
        ConfigError: the file cannot be read, or is not a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check its permissions (ls -l).") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}. Fix it, or remove it and set --eod-id.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must contain a JSON object. Fix it, or remove it and set --eod-id.")
    return settings


def _content(token: Any, path: Path, key: str) -> str | None:
    """Return the content of a token declared as a string or as an object with ``content``; None if unset."""
    if isinstance(token, dict):
        token = token.get("content", token)
    if token is None or token == "":
        return None
    if not isinstance(token, str):
        raise ConfigError(f"{path}: {key} is {token!r}, but must be a string or an object with 'content'. {REMEDY}")
    return token


def _known(token: str, token_to_id: Callable[[str], int | None], path: Path, key: str) -> int:
    if (found := token_to_id(token)) is None:
        raise ConfigError(
            f"{path}: {key} is {token!r}, which is not in the vocabulary of tokenizer.json. Save the tokenizer with "
            "its tokens, or set the end-of-document id with --eod-id."
        )
    return found
