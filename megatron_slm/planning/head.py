"""Memory of the LM head: hidden states, logits and gradients, by implementation of the linear cross-entropy.

The constants are those of ``objective/linear_cross_entropy/chunked.py``, which a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slm.planning.layout import Layout

MIB = 1 << 20
FP32 = 4
SAVED_LOGITS_MB = {"cpu": 64, "cuda": 2048}
CHUNK_BYTES = {"cpu": 8 * MIB, "cuda": 64 * MIB}
SHARE_OF_LOGITS = 1 / 16
MIN_CHUNK_BYTES = MIB // 4
MIN_ENTRIES = 64
WIDTH_MULTIPLE = 256
FORWARD_GRAD_ROWS = {"cpu": 512, "cuda": 4096}
MIN_ROW_CHUNKS = {"cpu": 8, "cuda": 2}
SLICE_BYTES = {"cpu": 2 * MIB, "cuda": 64 * MIB}
CONVERTED_BYTES = 8 * MIB


@dataclass(frozen=True)
class HeadMemory:
    """Hold the bytes of the LM head beside its weight and the hidden states."""

    saved: int  # from the forward pass until the backward pass
    forward: int  # largest temporary memory of the forward pass, saved values included
    backward: int  # largest memory of the backward pass, saved values included

    @property
    def peak(self) -> int:
        """Return the largest memory."""
        return max(self.forward, self.backward)


def head_memory(layout: Layout) -> HeadMemory:
    """Return the memory of the LM head for one micro-batch on the last stage."""
    device = "cuda" if layout.device.is_gpu else "cpu"
    model, objective = layout.config.model, layout.config.objective
    tokens, hidden = layout.tokens, model.hidden_size
    vocabulary = layout.padded_vocab // layout.tensor
    logits = FP32 * tokens * vocabulary
    weight = vocabulary * hidden
    if objective.slm_cross_entropy == "torch":
        selection = int((2 + layout.selected_share) * logits)  # exponentials, their gradient, selected rows of it
        products = logits + FP32 * (weight + tokens * hidden)
        return HeadMemory(saved=logits, forward=2 * logits, backward=max(selection, products))
    rows = FP32 * tokens * hidden  # hidden states, or their gradient, in fp32
    product = layout.value_bytes if device == "cuda" else FP32  # bytes of a factor of the matrix products
    gathered = tokens * hidden * product if _copies_hidden(layout, product) else 0
    converted = CONVERTED_BYTES if product != layout.value_bytes else 0
    chunk = min(CHUNK_BYTES[device], logits, max(int(logits * SHARE_OF_LOGITS), MIN_CHUNK_BYTES))
    scratch = min(SLICE_BYTES[device], chunk) if device == "cpu" else 0
    limit = objective.slm_saved_logits_mb
    fits = logits <= (SAVED_LOGITS_MB[device] if limit is None else limit) * MIB
    selected = layout.selected_share
    placeholder = weight * layout.value_bytes
    gradient = rows + int(selected * rows)  # of all hidden states, and of selected ones with their copy
    if product != FP32:
        gradient = int(tokens * hidden * product * (1 + selected) + selected * rows)
    if fits:
        saved, forward = logits, logits + gathered + scratch
        picked = int(selected * chunk) if device == "cuda" else 0  # a CPU overwrites the saved chunk
        backward = saved + gathered + gradient + picked + scratch
    elif layout.computes_gradient_in_forward:
        saved = tokens * hidden * product + FP32 * weight
        share = max(-(-tokens // MIN_ROW_CHUNKS[device]), MIN_CHUNK_BYTES // (FP32 * vocabulary))
        rows_of_chunk = max(min(FORWARD_GRAD_ROWS[device], share, tokens), 1)
        row_chunk = FP32 * rows_of_chunk * vocabulary
        forward = saved + gathered + row_chunk + 2 * FP32 * rows_of_chunk * hidden + scratch + converted
        backward = saved + gathered + tokens * hidden * product
    else:
        saved = 0
        forward = gathered + chunk + scratch + converted
        backward = gathered + gradient + int(selected * chunk) + scratch + converted
    backward = max(backward, gathered + tokens * hidden * product + placeholder)
    return HeadMemory(saved, forward, backward)


def chunk_width(layout: Layout, rows: int) -> int:
    """Return the vocabulary entries of a chunk of ``rows`` rows of logits on a CPU, chosen for all tokens."""
    vocabulary = layout.padded_vocab // layout.tensor
    logits = FP32 * layout.tokens * vocabulary
    chunk = min(CHUNK_BYTES["cpu"], max(int(logits * SHARE_OF_LOGITS), MIN_CHUNK_BYTES))
    width = chunk // (FP32 * max(rows, 1))
    width -= width % (WIDTH_MULTIPLE if width >= WIDTH_MULTIPLE else MIN_ENTRIES)
    return min(max(width, MIN_ENTRIES), vocabulary)


def _copies_hidden(layout: Layout, product: int) -> bool:
    """Return whether the hidden states are gathered, or converted to the dtype of the products."""
    return layout.config.parallel.sequence_parallel or product != layout.value_bytes
