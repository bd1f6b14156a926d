"""Precomputed reference scores, read with the data from sidecars of tools/score_corpus.py."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.data.batches import MicroBatch
from megatron_slm.objective.tokens import ReferenceScores


def sidecar_scores(micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
    """Return the scores in the micro-batches: reference losses and optionally entropies, on every rank."""
    return [_micro_batch_scores(batch) for batch in micro_batches]


def _micro_batch_scores(batch: MicroBatch) -> ReferenceScores:
    assert batch.reference_loss is not None, "the dataset was built without sidecars"
    return ReferenceScores(loss=batch.reference_loss, entropy=batch.reference_entropy)
