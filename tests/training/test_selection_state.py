"""Test the selection state in checkpoints of earlier versions, other layouts and other strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.config.schema import RunConfig
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, losses, make_corpus, records
from megatron_slm.training import checkpoint
from megatron_slm.training.state import TrainState

PREDICTED = ["--slm-scope", "global-batch", "--slm-threshold", "predicted"]
SLM: dict[str, Any] = {"objective": "slm", "slm_score": "token-loss", "train_iters": 6}
STRATEGIES = {
    "predicted": PREDICTED,
    "speculative": ["--slm-scope", "micro-batch", "--slm-exact-mode", "speculative"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("selection") / "corpus", 1)


def slm(corpus: str, save: Path, *flags: str, **more: Any) -> list[str]:
    return [*command(corpus, save, load=save, **SLM, **more), *flags]


def _save_as_0_2(rank: int, world_size: int, argv: list[str]) -> None:
    """Run the trainer with the selection state in the format of versions 0.1 and 0.2."""

    def all_state(state: TrainState, config: RunConfig) -> dict[str, Any]:
        content = current(state, config)
        del content[checkpoint.SELECTION]
        if state.selection.has_rank_state:
            content["guess"] = checkpoint.selection_state(state, "guess")
        else:
            values = state.selection.state_dict()["values"]
            content["carried"] = {"policy": "Term(score='token-loss', ratio=None, stochastic=False)", "values": values}
        return content

    current = checkpoint._all_state
    with mock.patch.object(checkpoint, "_all_state", all_state):
        assert main(argv) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_of_earlier_versions_resume_bit_for_bit(tmp_path: Path, corpus: str, strategy: str) -> None:
    flags = STRATEGIES[strategy]
    launch(command(corpus, tmp_path / "uninterrupted", losses_only=True, **SLM) + flags)
    run_ranks(_save_as_0_2, 1, slm(corpus, tmp_path / "part", *flags, exit_interval=3), initialize=False)
    launch(slm(corpus, tmp_path / "part", *flags))
    assert losses(tmp_path / "part") == losses(tmp_path / "uninterrupted")


def test_predicted_threshold_resumes_in_other_layouts_only_if_predicted(tmp_path: Path, corpus: str) -> None:
    run = tmp_path / "run"
    launch(slm(corpus, run, *PREDICTED, exit_interval=2))
    launch(slm(corpus, run, *PREDICTED, exit_interval=4, pipeline_model_parallel_size=2), 2)
    assert [record["seconds_ranking"] is not None for record in records(run)] == [True, False, False, False]
    launch(slm(corpus, run, *STRATEGIES["speculative"]))
    assert len(records(run)) == 6
