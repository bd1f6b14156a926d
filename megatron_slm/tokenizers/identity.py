"""Tokenizer identity recorded in corpora and checkpoints, and its comparison with the tokenizer of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_slm.tokenizers.base import Tokenizer


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the identity to record in corpora and checkpoints."""
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


def identity_conflict(recorded: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, str, str] | None:
    """Return descriptions of both tokenizers and a remedy if the identities differ; None if they match.

    Earlier releases recorded no end-of-document id, and recorded the entry count as the vocabulary size.
    """
    eod = recorded.get("eod", tokenizer.eod)
    sizes = (tokenizer.vocab_size,) if "eod" in recorded else (tokenizer.vocab_size, tokenizer.entries)
    for field, theirs, ours, remedy in (
        ("vocabulary size", recorded["vocab_size"], sizes, "Use the same tokenizer"),
        ("fingerprint", recorded["fingerprint"], (tokenizer.fingerprint,), "Use the same tokenizer"),
        ("end-of-document id", eod, (tokenizer.eod,), f"Set --eod-id {eod}, or use the same tokenizer"),
    ):
        if theirs not in ours:
            return f"{recorded['name']} of {field} {theirs}", f"{tokenizer.name} of {field} {ours[0]}", remedy
    return None
