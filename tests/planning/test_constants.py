"""Constants that the planner repeats, since their modules import torch."""

from __future__ import annotations

from megatron_slm.model import gpt
from megatron_slm.objective.linear_cross_entropy import chunk_math, chunked
from megatron_slm.objective.selection import threshold
from megatron_slm.planning import communication, head


def test_constants_of_the_lm_head() -> None:
    assert head.SAVED_LOGITS_MB == gpt.SAVED_LOGITS_MB
    assert head.SLICE_BYTES == chunk_math.SLICE_BYTES
    names = ("CHUNK_BYTES", "SHARE_OF_LOGITS", "MIN_CHUNK_BYTES", "FORWARD_GRAD_ROWS", "MIN_ROW_CHUNKS")
    for name in (*names, "CONVERTED_BYTES", "MIN_ENTRIES", "WIDTH_MULTIPLE"):
        assert getattr(head, name) == getattr(chunked, name), name


def test_histograms_of_the_threshold() -> None:
    assert tuple(8 << bits for _, bits in threshold.DIGITS) == communication.HISTOGRAM_BYTES
