"""Identity of a run's reference models, from the headers of its sidecars."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config.schema import ReferenceConfig
from megatron_slm.reference.identity import reference_identity
from megatron_slm.scores.quantization import Quantization
from megatron_slm.scores.sets import Headers
from megatron_slm.scores.sidecar import ContextRule, ScoresHeader


def headers(*models: str, corpora: int = 2) -> Headers:
    """Return headers of one sidecar per model and corpus, in the order of the names."""
    losses = Quantization.for_losses(257)
    return {
        Path(f"corpus{corpus}.{name}.scores"): ScoresHeader(
            100, "corpus", "tokenizer", model, ContextRule("document", 32, 16), losses, None
        )
        for name, model in enumerate(models)
        for corpus in range(corpora)
    }


@pytest.mark.parametrize(("combine", "differs"), [("mean", False), ("min", False), ("0.7,0.3", True)])
def test_exchanged_sidecars_differ_if_they_have_weights(combine: str, differs: bool) -> None:
    reference = ReferenceConfig(reference_scores=["first", "second"], reference_combine=combine)
    identities = [reference_identity(reference, headers(*models)) for models in (("a", "b"), ("b", "a"))]
    assert (identities[0] != identities[1]) == differs
    assert reference_identity(reference, headers("a", "b", corpora=3)) == identities[0]


def test_identity_of_one_sidecar_does_not_depend_on_the_combination() -> None:
    """Checkpoints of earlier versions record it."""
    one = ReferenceConfig(reference_scores=["first"])
    weighted = ReferenceConfig(reference_scores=["first"], reference_combine="1")
    assert reference_identity(one, headers("a")) == reference_identity(weighted, headers("a"))
