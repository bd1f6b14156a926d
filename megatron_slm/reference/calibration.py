"""The sample of a corpus to which the codebooks of its sidecar are fitted, before anything else is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_slm.data.corpus import CorpusInfo
from megatron_slm.data.scores.codebooks import TokenCode
from megatron_slm.data.scores.sidecar import ContextRule
from megatron_slm.reference.windows import Row, make_plan

LEAST_TOKENS, MOST_TOKENS = 1 << 20, 1 << 26
SHARE = 0.01  # of the corpus, between those two: what the sample costs in a long run
CHUNKS = 16  # from at least so many places of the corpus

Found = tuple[NDArray[np.float32], NDArray[np.int64]]  # losses [n], ids [n]


def sample_size(tokens: int) -> int:
    """Tokens that are looked at in a corpus of ``tokens``."""
    return min(tokens, max(LEAST_TOKENS, min(MOST_TOKENS, int(tokens * SHARE))))


def sample_rows(corpus: CorpusInfo, rule: ContextRule) -> Iterator[Row]:
    """Rows that hold about that many, spread over the whole corpus; the same whoever asks."""
    plan = make_plan(corpus, rule)
    wanted = sample_size(corpus.tokens)
    count = min(plan.chunks, max(CHUNKS, wanted // LEAST_TOKENS))
    for number in range(count):
        rows = plan.rows(number * plan.chunks // count)
        tokens = sum(each.stop - each.first for row in rows for each in row)
        yield from rows[:: max(1, round(tokens * count / wanted))]


def count_losses(
    code: TokenCode, rows: Iterator[Row], together: int, score: Callable[[Sequence[Row]], Found], device: torch.device
) -> NDArray[np.int32]:
    """The histogram of the sample's losses, [vocabulary, bins], on every rank. Collective over all ranks.

    They are integers, so that their sum does not depend on which rank scored which row.

    Args:
        together: rows that all ranks score in one call.
        score: what this rank found in its share of them, and nothing on ranks that report no losses.
    """
    counts = np.zeros((code.vocab_size, code.bins), np.int32)
    while batch := list(islice(rows, together)):
        code.count(counts, *score(batch))
    total = torch.from_numpy(counts).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()
