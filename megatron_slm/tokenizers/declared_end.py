"""The end-of-document token of a ``tokenizer.json``, as the files beside it declare it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_slm.runtime.errors import ConfigError

USUAL_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
REMEDY = "Give its id with --eod-id."


def declared_end(path: Path, token_to_id: Callable[[str], int | None]) -> int:
    """Return the id of the token that ends documents.

    It is the ``eos_token`` (or, without one, the ``sep_token``) of ``tokenizer_config.json`` or, without either, of
    ``special_tokens_map.json``; else the ``eos_token_id`` of ``generation_config.json``; else the one usual name that
    is in the vocabulary.

    Args:
        path: the ``tokenizer.json``.
        token_to_id: returns the id of a token, or None.

    Raises:
        ConfigError: a file that cannot be read, a declared token that is not in the vocabulary, no token, or several.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json_settings(path.with_name(name))
        for key in ("eos_token", "sep_token"):
            if (content := _content(settings.get(key), path.with_name(name), key)) is not None:
                return _known(content, token_to_id, path.with_name(name), key)
    declared = json_settings(path.with_name("generation_config.json")).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    place = f"{path.with_name('generation_config.json')}: eos_token_id"
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConfigError(f"{place} is {declared!r}, and must be one id or a list of ids. {REMEDY}")
    if not ids:
        place = f"--tokenizer-model {path}, which no eos_token accompanies"
        ids = [token for name in USUAL_NAMES if (token := token_to_id(name)) is not None]
    if len(set(ids)) > 1:
        raise ConfigError(f"{place}: any of the ids {', '.join(map(str, ids))} may end a document. {REMEDY}")
    if not ids:
        raise ConfigError(
            f"--tokenizer-model {path} has no token that ends a document (no eos_token in tokenizer_config.json, none "
            f"of {', '.join(USUAL_NAMES)}). {REMEDY}"
        )
    return ids[0]


def json_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a JSON file; none if there is no such file.

    Raises:
        ConfigError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Look at its permissions (ls -l).") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}. Mend it, or remove it and give --eod-id.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} should hold a JSON object. Mend it, or remove it and give --eod-id.")
    return settings


def _content(token: Any, path: Path, key: str) -> str | None:
    """Return the text of a token that is declared as text or as an object with a ``content``; None if unset."""
    if isinstance(token, dict):
        token = token.get("content", token)
    if token is None or token == "":
        return None
    if not isinstance(token, str):
        raise ConfigError(f"{path}: {key} is {token!r}, and must be a token or an object with a 'content'. {REMEDY}")
    return token


def _known(token: str, token_to_id: Callable[[str], int | None], path: Path, key: str) -> int:
    if (found := token_to_id(token)) is None:
        raise ConfigError(
            f"{path}: {key} is {token!r}, which is not in the vocabulary of tokenizer.json. Save the tokenizer with "
            "its tokens, or give the id of the token that ends documents with --eod-id."
        )
    return found
