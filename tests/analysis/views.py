"""A view of random losses over tokens with special characters, for tests of its output."""

from __future__ import annotations

import numpy as np

from megatron_slm.analysis.selection_view import CheckpointTokens, ReferenceTokens, SelectionView

SPECIAL = ("\n", "\t", "", "😀", " שלום", "<b>", "</script>", "<!--", "\x1b[31m", "\u202e", "&amp;", "\u2028", "{{js}}")
EOD = 2


def make_view(words: list[str], checkpoints: int = 1) -> SelectionView:
    """Return a view whose tokens are ``words``, with the end-of-document token after the last."""
    texts, rng = [*words, ""], np.random.default_rng(1)
    reference = rng.gamma(2, 1.5, len(texts)).astype(np.float32)
    shown = []
    for number in range(checkpoints):
        loss = (reference + rng.normal(1, 1, len(texts))).astype(np.float32)
        score = loss - reference
        threshold = float(np.sort(score)[-max(1, round(0.6 * len(texts)))])
        selected = score >= threshold
        label = f"slm step {100 * (number + 1)}"
        shown.append(CheckpointTokens(label, "/slm", "excess", 0.6, "excess", False, threshold, loss, score, selected))
    ids = [*range(10, 10 + len(words)), EOD]
    starts = [0, len(texts) // 2, len(texts)]
    return SelectionView(
        "a<b>&.txt", "ByteTokenizer", 64, 32, ids, texts, starts, EOD, ReferenceTokens("rm", "/rm", reference), shown
    )
