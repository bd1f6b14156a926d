"""Token losses and selections of a text under one or more checkpoints, and their JSON file."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.runtime.files import is_json_of, write_bytes

JSON_FLAG = "--json"
KIND = "selection"
PART = "·"  # shown for a token whose character a later token completes
END = "⟨end⟩"  # shown for the end-of-document token
MARKS = {"\n": "↵\n", "\t": "⇥   "}
JOINERS = "\u200c\u200d"  # shape letters and emoji
DECIMALS = 5  # of values in files

is_selection = partial(is_json_of, kind=KIND)


@dataclass(frozen=True)
class ReferenceTokens:
    """Reference losses of the tokens, nats."""

    label: str
    directory: str
    loss: NDArray[np.float32]  # [n]
    entropy: NDArray[np.float32] | None = None  # [n]


@dataclass(frozen=True)
class CheckpointTokens:
    """Token losses and the selection of one checkpoint of the training model."""

    label: str
    directory: str
    policy: str  # --slm-score
    ratio: float | None  # None if every term of the policy has its own
    score_name: str  # of the first top-k of the policy
    lowest_first: bool  # whether this top-k selects the lowest scores
    threshold: float  # of this top-k
    loss: NDArray[np.float32]  # [n], nats
    score: NDArray[np.float32]  # [n], that this top-k ranks by
    selected: NDArray[np.bool_]  # [n]


@dataclass(frozen=True)
class SelectionView:
    """Tokens of one or more texts with their losses under each checkpoint."""

    source: str  # name of the input
    tokenizer: str
    window: int  # tokens of a scoring window
    stride: int
    ids: list[int]  # [n]
    texts: list[str]  # [n]
    starts: list[int]  # first token of each text, and n
    eod: int
    reference: ReferenceTokens | None
    checkpoints: Sequence[CheckpointTokens]

    def excess(self, checkpoint: CheckpointTokens) -> NDArray[np.float32] | None:
        """Return token loss − reference loss, [n]; None without a reference model."""
        return None if self.reference is None else checkpoint.loss - self.reference.loss

    def shown(self) -> list[str]:
        """Return the visible form of every token, see :func:`visible`."""
        return [END if token == self.eod else visible(text) for token, text in zip(self.ids, self.texts, strict=True)]


def visible(text: str) -> str:
    """Return a text with marks for newlines, tabs and invisible characters, which could reorder or hide others."""
    is_invisible = all(character in JOINERS for character in text)
    return "".join(_visible(character, keep_joiner=not is_invisible) for character in text) or PART


def _visible(character: str, *, keep_joiner: bool) -> str:
    if character.isprintable() or (keep_joiner and character in JOINERS):
        return character
    if unicodedata.category(character) == "Zs":  # wide and narrow spaces
        return character
    return MARKS.get(character, f"⟨U+{ord(character):04X}⟩")


def write_json(view: SelectionView, path: str) -> None:
    """Write the tokens and their values as JSON; docs/analysis.md describes the keys."""
    reference = view.reference
    content = {
        "kind": KIND,
        "input": view.source,
        "tokenizer": view.tokenizer,
        "seq_length": view.window,
        "stride": view.stride,
        "eod": view.eod,
        "texts": view.starts[:-1],
        "token_ids": view.ids,
        "token_texts": view.texts,
        "reference": None if reference is None else {"label": reference.label, "directory": reference.directory},
        "reference_loss": None if reference is None else rounded(reference.loss),
        "reference_entropy": None if reference is None or reference.entropy is None else rounded(reference.entropy),
        "checkpoints": [_checkpoint(view, each) for each in view.checkpoints],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # directories may have names that are not UTF-8: their surrogates become escapes of JSON
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"), JSON_FLAG, is_ours=is_selection_file)


def _checkpoint(view: SelectionView, checkpoint: CheckpointTokens) -> dict[str, Any]:
    excess = view.excess(checkpoint)
    return {
        "label": checkpoint.label,
        "directory": checkpoint.directory,
        "slm_score": checkpoint.policy,
        "slm_selection_ratio": checkpoint.ratio,
        "score": checkpoint.score_name,
        "threshold": round(checkpoint.threshold, DECIMALS),
        "token_loss": rounded(checkpoint.loss),
        "excess_loss": None if excess is None else rounded(excess),
        "scores": rounded(checkpoint.score),
        "selected": checkpoint.selected.astype(int).tolist(),
    }


def rounded(values: NDArray[np.float32]) -> list[float]:
    """Return values as floats with few digits."""
    return values.astype(np.float64).round(DECIMALS).tolist()


def is_selection_file(path: Path) -> bool:
    """Return whether a file is empty, or a result of :func:`write_json`."""
    return not path.stat().st_size or is_selection(path)
