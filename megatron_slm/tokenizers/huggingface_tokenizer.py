"""Tokenizers based on the ``tokenizers`` library: ``tokenizer.json`` files, and GPT-2 vocabulary and merge files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.base import (
    TEXT,
    Tokenizer,
    TokenizerFiles,
    fingerprint_files,
    missing_eod_error,
    require_file,
)
from megatron_slm.tokenizers.byte_lengths import ByteLengths, huggingface_byte_lengths
from megatron_slm.tokenizers.eod import find_bos, find_ends, find_eod, json_settings
from megatron_slm.tokenizers.fast_model import FastModel
from megatron_slm.tokenizers.huggingface_fast import huggingface_fast_model


class _TokenizersModel(Tokenizer):
    """Wrap a ``tokenizers.Tokenizer``.

    Special tokens that occur in a text are encoded as text or, if ``special_tokens`` is "tokens", as special tokens
    (Megatron-LM's behavior).
    """

    model: Any

    def _use(self, model: Any, files: TokenizerFiles) -> None:
        model.encode_special_tokens = files.special_tokens == TEXT
        self.model = model
        ids = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        added = model.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.special_texts = frozenset(entry.content for entry in added.values() if entry.special)
        self.added_texts = frozenset(entry.content for entry in added.values())

    @property
    def entries(self) -> int:
        return self.model.get_vocab_size(with_added_tokens=True)

    @property
    def ends_texts(self) -> bool:
        return self.encode("a")[-1:] == [self.eod]

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def encode_plain(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> ByteLengths | None:
        return huggingface_byte_lengths(self.model, self.vocab_size)

    def fast_model(self) -> FastModel:
        return huggingface_fast_model(self.model)


class HuggingFaceTokenizer(_TokenizersModel):
    """Load a ``tokenizer.json``, or the directory that contains it, offline.

    The end-of-document id is --eod-id if set, otherwise the declared one (see eod.py). The file's post-processor is
    applied, as in Megatron-LM; truncation and padding are disabled.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        import tokenizers

        path = Path(files.model or "")
        path = path / "tokenizer.json" if path.is_dir() else path
        path = require_file(str(path) if files.model else None, "--tokenizer-model", "HuggingFaceTokenizer")
        super().__init__(fingerprint_files(path), f"--tokenizer-model {path}")
        try:
            declared = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for unreadable files
            raise ConfigError(f"--tokenizer-model {path} is not a tokenizer.json: {error}") from error
        model.no_truncation()
        model.no_padding()
        _check_declared_ids(path, declared, model)
        self._use(model, files)
        self.eod = find_eod(path, model.token_to_id) if files.eod_id is None else files.eod_id
        self.path, self.has_given_eod = path, files.eod_id is not None

    @cached_property
    def bos(self) -> int | None:
        return find_bos(self.path, self.model.token_to_id)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        return frozenset((self.eod, *([] if self.has_given_eod else find_ends(self.path))))


class GPT2BPETokenizer(_TokenizersModel):
    """Load GPT-2's byte-level BPE from a vocabulary and a merge file; <|endoftext|> ends documents."""

    END = "<|endoftext|>"

    def __init__(self, files: TokenizerFiles) -> None:
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers

        vocab = require_file(files.vocab, "--vocab-file", "GPT2BPETokenizer")
        merges = require_file(files.merges, "--merge-file", "GPT2BPETokenizer")
        super().__init__(fingerprint_files(vocab, merges), f"--vocab-file {vocab}, --merge-file {merges}")
        try:
            model = Model(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises bare Exception for unreadable files
            raise ConfigError(f"--vocab-file {vocab} and --merge-file {merges} cannot be read: {error}") from error
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        if (end := model.token_to_id(self.END)) is not None:
            model.add_special_tokens([self.END])
        self._use(model, files)
        eod = end if files.eod_id is None else files.eod_id
        if eod is None:
            raise missing_eod_error(f"--vocab-file {vocab}")
        self.eod = eod


def _check_declared_ids(path: Path, declared: Sequence[dict[str, Any]], model: Any) -> None:
    """Raise ConfigError if the library assigns an added token an id other than the declared one.

    The library numbers added tokens from the entry count on, so that in a vocabulary with unused ids they may receive
    ids of other tokens.
    """
    for token in declared:
        if (loaded := model.token_to_id(token["content"])) != token["id"]:
            raise _other_id(path, token["content"], token["id"], loaded)
    config = path.with_name("tokenizer_config.json")
    decoder = json_settings(config).get("added_tokens_decoder")
    for name, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        loaded = model.token_to_id(content) if isinstance(content, str) else None
        if loaded is not None and name != str(loaded):
            raise _other_id(config, content, name, loaded)


def _other_id(path: Path, token: Any, declared: Any, loaded: int | None) -> ConfigError:
    return ConfigError(
        f"--tokenizer-model: {path} declares the added token {token!r} with id {declared}, but the tokenizers library "
        f"loads it with id {loaded}. Add the token to the vocabulary of tokenizer.json under its id, and fill unused "
        "ids with placeholder entries."
    )
