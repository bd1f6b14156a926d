"""Several co-located reference models, whose scores are combined, or each of which scores its corpora."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_slm.data.batches import MicroBatch
from megatron_slm.objective.tokens import ReferenceScores
from megatron_slm.reference.replica import ReferenceReplica
from megatron_slm.scores.combination import Combine


class ReferenceEnsemble:
    """Score micro-batches with several replicas, one after the other.

    Every replica computes the scores of all rows, also if each has corpora of its own: a micro-batch may have rows of
    any corpus, and all ranks of a replica take part in each pass.

    Args:
        replicas: the reference models, in the order of ``--reference-load``.
        combine: combination of their scores for each token.
        of_corpus: instead of it, position of the replica of each corpus of the blend.
    """

    def __init__(self, replicas: Sequence[ReferenceReplica], combine: Combine, of_corpus: Sequence[int] = ()) -> None:
        self.replicas, self._combine, self._of_corpus = replicas, combine, of_corpus

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[ReferenceScores]:
        """Compute reference losses and optionally entropies. Collective over all ranks of the replicas.

        Returns:
            one entry per micro-batch on the last pipeline stage, an empty list on other stages.
        """
        scores = [replica.score(micro_batches) for replica in self.replicas]
        return [
            self._combined(batch, each) for batch, *each in zip(micro_batches, *scores, strict=False)
        ]  # scores are empty on other stages

    def _combined(self, batch: MicroBatch, scores: Sequence[ReferenceScores]) -> ReferenceScores:
        entropies = [each.entropy for each in scores if each.entropy is not None]
        return ReferenceScores(
            self._values(batch, [each.loss for each in scores]), self._values(batch, entropies) if entropies else None
        )

    def _values(self, batch: MicroBatch, values: Sequence[Tensor]) -> Tensor:
        """Return the scores [b, s] of each token from those of every replica."""
        if not self._of_corpus:
            return self._combine.tensors(values)
        assert batch.corpus is not None, "the samples come from one corpus"
        replica = torch.zeros_like(batch.corpus)
        for corpus, place in enumerate(self._of_corpus):  # a tensor of them would be a copy that the host waits for
            replica.masked_fill_(batch.corpus == corpus, place)
        return torch.stack(list(values)).gather(0, replica[None, :, None].expand(1, *values[0].shape))[0]
