"""Reference scores that were computed once, by tools/score_corpus.py, and come with the data."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.data.batches import MicroBatch
from megatron_slm.objective.tokens import ReferenceScores


class SidecarScores:
    """A reference source that runs no model: every micro-batch already holds the scores of its labels."""

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
        """Reference losses (and entropies) of every token, one entry per micro-batch, on every rank."""
        return [self._of(batch) for batch in micro_batches]

    def _of(self, batch: MicroBatch) -> ReferenceScores:
        assert batch.reference_loss is not None, "the dataset was built without its sidecars"
        return ReferenceScores(loss=batch.reference_loss, entropy=batch.reference_entropy)
