"""Tokenizer settings from saved arguments, and tokenizer files in checkpoints of Megatron-LM and NeMo 2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.megatron_lm.arguments import TOKENIZER, settings_of

NULL = "NullTokenizer"
# Directories with a copy of the tokenizer's files, relative to the checkpoint directory.
_DIRECTORIES = ("tokenizer", "../context/nemo_tokenizer")
# Names of the copies by tokenizer type and setting, in Megatron-LM.
_FILES: dict[str, dict[str, str]] = {
    "HuggingFaceTokenizer": {"tokenizer_model": "."},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    "SentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "GPTSentencePieceTokenizer": {"tokenizer_model": "tokenizer.model"},
    "Llama2Tokenizer": {"tokenizer_model": "tokenizer.model"},
    "TikTokenizer": {"tokenizer_model": "tokenizer.json"},
}


def tokenizer_settings(arguments: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return the tokenizer settings; files in the checkpoint are preferred to the paths in its arguments."""
    recorded = {name: value for name, value in settings_of(arguments).items() if name in TOKENIZER}
    kind = recorded.get("tokenizer_type")
    vocab_size = arguments.get("vocab_size")
    if kind == NULL and isinstance(vocab_size, int):
        recorded["vocab_size"] = vocab_size
    for name in _DIRECTORIES:
        copies = directory / name
        if kind is None and (copies / "tokenizer.json").is_file():
            return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(copies.resolve())}
        files = {setting: copies / file for setting, file in _FILES.get(str(kind), {}).items()}
        if files and copies.is_dir() and any(copies.iterdir()) and all(path.exists() for path in files.values()):
            return recorded | {setting: str(path.resolve()) for setting, path in files.items()}
    return recorded
