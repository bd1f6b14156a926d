"""--slm-log-dir: every rank records its steps, saves and errors."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.testing.tiny import command, launch, launch_and_fail, make_corpus


def test_every_rank_records_its_steps(tmp_path: Path) -> None:
    corpus, logs = make_corpus(tmp_path / "corpus", 1), tmp_path / "logs"
    launch(command(corpus, tmp_path / "run", dp=2, train_iters=2, slm_log_dir=logs), world_size=2)
    for rank in (0, 1):
        text = (logs / f"rank_{rank:05d}.log").read_text()
        events = [line.partition("loop: ")[2] for line in text.splitlines() if " megatron_slm.training.loop: " in line]
        memory = [event for event in events if event.startswith("memory ")]
        assert len(memory) == 2  # one per logged step
        assert [event for event in events if event not in memory] == [
            *("evaluating at step 0", "step 1", "step 2", "saving step 2", "evaluating at step 2"),
        ]
        assert f" rank {rank} INFO " in text
    code, _ = launch_and_fail(command(corpus, dp=1, train_iters=2, lr=1e6, slm_log_dir=logs))
    assert code and "DivergedError" in (logs / "rank_00000.log").read_text()
