"""Test that a dry run reports the same errors and notes as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.testing.tiny import command, launch, make_corpus

TAIL = 40  # bytes at the end of a file, in the data of its last tensor


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dry")
    make_corpus(directory / "corpus", 1)
    launch(command(corpus(directory), directory / "rm", train_iters=1))
    launch(command(corpus(directory), directory / "changed", train_iters=1))
    data = next((directory / "changed" / "iter_0000001").glob("__0_0.distcp"))
    data.write_bytes(data.read_bytes()[:-TAIL] + bytes(TAIL))
    (directory / "eio").symlink_to("/proc/self/mem")  # a regular file that cannot be read
    return directory


def corpus(directory: Path) -> str:
    return str(directory / "corpus_text_document")


CASES: list[tuple[dict[str, Any], str]] = [
    ({"objective": "slm"}, "needs a reference model"),
    ({"objective": "slm", "reference_load": "rm", "seq_length": 64}, "--reference-load"),
    ({"objective": "slm", "reference_load": "changed"}, "does not match its checksum"),
    ({"objective": "slm", "reference_load": "rm", "reference_ckpt_step": 7}, "--reference-load"),
    ({"slm_cross_entropy": "triton"}, "--slm-cross-entropy triton: "),
    ({"transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine"),
    ({"distributed_backend": "nccl"}, "--distributed-backend nccl needs a GPU"),
    ({"num_experts": 2, "moe_token_dispatcher_type": "alltoall"}, "alltoall needs GPUs"),
    ({"train_iters": 2**31 - 1}, "--train-iters 2147483647"),
    ({"eval_iters": 2**31 - 1}, "--eval-iters 2147483647"),
    ({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "eio"}, "eio cannot be read (Input/output error)"),
    ({"load": "/nowhere"}, "--load /nowhere"),
    ({"load": "rm", "hidden_size": 64}, "--hidden-size 64"),
    ({"load": "changed", "train_iters": 2}, "does not match its checksum"),
    ({"load": "rm", "ckpt_step": 3}, "--load"),
    ({"load": "rm", "lr": 0.5}, "the configured schedule differs from that of"),
]


@pytest.mark.parametrize(("flags", "message"), CASES, ids=lambda value: str(value)[:60])
def test_dry_run_and_run_report_the_same_error(
    workspace: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], message: str
) -> None:
    paths = ("reference_load", "load", "tokenizer_model")
    given = {name: workspace / str(value) if name in paths else value for name, value in flags.items()}
    argv = command(corpus(workspace), **{"train_iters": 1, **given})
    errors = []
    for action in ([], ["--dry-run"]):
        assert main([*argv, *action]) == 2
        errors.append(capsys.readouterr().err)
    assert message in errors[0] and "Traceback" not in errors[0], errors[0]
    assert errors[1] == errors[0]


def test_note_is_printed(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*command(corpus(workspace), train_iters=1), "--use-mcore-models", "--log-params-norm"]
    for action in ([], ["--dry-run"]):
        assert main([*argv, *action]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "satisfied by every run: --use-mcore-models; without effect: --log-params-norm" in shown


def test_a_complete_run_has_nothing_to_train(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(corpus(workspace), load=workspace / "rm", train_iters=1)
    for action in ([], ["--dry-run"]):
        assert main([*argv, *action]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "nothing to train: the checkpoint is at step 1 (16 samples), and the run ends at --train-iters 1" in text
