"""Corpus and uninterrupted run of the tests on a Slurm cluster."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_slm.testing.tiny import command, launch, losses, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("slurm") / "corpus", 1)


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: str
) -> list[tuple[Any, ...]]:
    """Return the losses of a run of STEPS steps of the test's module on two ranks."""
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    launch(command(corpus, save, dp=2, train_iters=request.module.STEPS), 2)
    return losses(save)
