"""Tokenizer files of an exported model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.huggingface.files import (
    CHAT_TEMPLATES,
    GENERATION_FILE,
    MERGES,
    SENTENCEPIECE_MODEL,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    VOCABULARY,
)
from megatron_slm.checkpoint.huggingface.source import tokenizer_settings
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.console import warn
from megatron_slm.tokenizers.base import Tokenizer
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer

FLAG = "--tokenizer-model"


@dataclass(frozen=True)
class TokenizerSource:
    """Tokenizer files to copy: name in the exported model -> path."""

    files: dict[str, Path]
    directory: Path | None  # directory of a published tokenizer
    eod: int | None = None
    bos: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # contents of tokenizer_config.json, if it must be written
    vocab_size: int = 0  # number of tokens, if known


def find_tokenizer(config: RunConfig, model: str | None) -> TokenizerSource:
    """Return the tokenizer of a run, or the one at ``model``: of the same kind, or the directory of a published model.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    if model is not None:
        config = with_settings(config, tokenizer_settings(Path(model)) or {"tokenizer_model": model})
    given = config.tokenizer
    if given.tokenizer_type is None:
        warn(f"the checkpoint records no tokenizer, and the export contains none. Add one with {FLAG}.")
        return TokenizerSource({}, None)
    tokenizer = build_run_tokenizer(config)
    return replace(_files(config, tokenizer), vocab_size=tokenizer.vocab_size)


def _files(config: RunConfig, tokenizer: Tokenizer) -> TokenizerSource:
    given = config.tokenizer
    path = Path(given.tokenizer_model or "")
    if given.tokenizer_type == "HuggingFaceTokenizer":
        directory = path if path.is_dir() else path.parent
        files = present_files(directory)
        return TokenizerSource(files | ({} if path.is_dir() else {TOKENIZER_JSON: path}), directory, tokenizer.eod)
    if given.tokenizer_type == "GPT2BPETokenizer":
        assert given.vocab_file is not None and given.merge_file is not None
        files = {VOCABULARY: Path(given.vocab_file), MERGES: Path(given.merge_file)}
        return TokenizerSource(files, None, tokenizer.eod, tokenizer.eod, {"tokenizer_class": "GPT2Tokenizer"})
    if "SentencePiece" in given.tokenizer_type or given.tokenizer_type == "Llama2Tokenizer":
        return _sentencepiece(path, tokenizer.eod)
    warn(
        f"the export contains no tokenizer: published models have no equivalent of --tokenizer-type "
        f"{given.tokenizer_type}."
    )
    return TokenizerSource({}, None, tokenizer.eod)


def present_files(directory: Path) -> dict[str, Path]:
    """Return the files of a published tokenizer in a directory, by relative path."""
    paths = (*(directory / name for name in (GENERATION_FILE, *TOKENIZER_FILES)), *directory.glob(CHAT_TEMPLATES))
    return {str(path.relative_to(directory)): path for path in paths if path.is_file()}


def _sentencepiece(path: Path, eod: int) -> TokenizerSource:
    if path.name == SENTENCEPIECE_MODEL and (path.parent / TOKENIZER_JSON).is_file():
        return TokenizerSource(present_files(path.parent), path.parent, eod)
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_eos_token": False}
    for name, token in (("bos_token", pieces.bos_id()), ("eos_token", eod), ("unk_token", pieces.unk_id())):
        settings[name] = pieces.id_to_piece(token) if token >= 0 else None
    bos = pieces.bos_id() if pieces.bos_id() >= 0 else None
    return TokenizerSource({SENTENCEPIECE_MODEL: path}, None, eod, bos, settings)


def copy_files(files: Mapping[str, Path], directory: Path) -> None:
    """Copy files to relative paths in a directory.

    Raises:
        OSError: a file cannot be read or written.
    """
    for name, path in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)


def write_tokenizer(tokenizer: TokenizerSource, directory: Path) -> None:
    """Copy the tokenizer files to an exported model.

    Raises:
        OSError: a file cannot be read or written.
    """
    copy_files(tokenizer.files, directory)
    if tokenizer.settings:
        text = json.dumps(tokenizer.settings, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
