"""HTML page of the selection of a text."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_slm.analysis.page import encode_array, write_page
from megatron_slm.analysis.selection_view import PART, CheckpointTokens, SelectionView

NAME = "selection"  # of the template


def write_selection_page(view: SelectionView, path: str) -> None:
    """Write the page, atomically."""
    write_page(path, NAME, f"Selected tokens of {view.source}", page_data(view))


def page_data(view: SelectionView) -> dict[str, Any]:
    """Return the data of the page's script; arrays are base64."""
    reference = view.reference
    return {
        "source": view.source,
        "tokenizer": view.tokenizer,
        "window": view.window,
        "stride": view.stride,
        "shown": [shown if text or shown != PART else "" for text, shown in zip(view.texts, view.shown(), strict=True)],
        "starts": view.starts,
        "ids": encode_array(view.ids, np.int32),
        "reference": reference and {"label": reference.label, "loss": encode_array(reference.loss, np.float32)},
        "checkpoints": [_checkpoint(each) for each in view.checkpoints],
    }


def _checkpoint(checkpoint: CheckpointTokens) -> dict[str, Any]:
    return {
        "label": checkpoint.label,
        "policy": checkpoint.policy,
        "ratio": checkpoint.ratio,
        "scoreName": checkpoint.score_name,
        "sign": -1 if checkpoint.lowest_first else 1,
        "threshold": checkpoint.threshold,
        "loss": encode_array(checkpoint.loss, np.float32),
        "score": encode_array(checkpoint.score, np.float32),
        "selected": encode_array(checkpoint.selected, np.uint8),
    }
