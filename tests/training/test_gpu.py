"""Test that training on one GPU with NCCL agrees with a CPU with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.testing.tiny import BATCH, GLOBAL_BATCH, command, make_corpus, records

SLM = {"train_iters": 3, "objective": "slm", "slm_score": "token-loss", "finetune": True}
RUNS: dict[str, dict[str, Any]] = {
    "recompute": {},
    "speculative": {"slm_exact_mode": "speculative"},
    "kept": {"slm_saved_logits_mb": 64},
    "predicted": {"slm_scope": "global-batch", "slm_threshold": "predicted"},
}
WATCHED_TRAINER = """
import sys, warnings, torch
from megatron_slm.cli.pretrain import main
from megatron_slm.training import loop

train_step = loop.train_step

def watched(*args, **options):
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = train_step(*args, **options)
    torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message) and "megatron_slm" in each.filename]
    print("WAITS", *(f"{each.filename}:{each.lineno}" for each in waits))
    return step

loop.train_step = watched
sys.exit(main(sys.argv[1:]))
"""


def train(argv: list[str], *, devices: str | None) -> None:
    """Run the trainer in a separate process with these visible devices; None for all."""
    environment = dict(os.environ) if devices is None else {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_slm.pretrain", *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu")
    train(command(make_corpus(directory / "corpus", 1), directory / "base", train_iters=2), devices="")
    return directory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", RUNS)
def test_host_waits_once_per_micro_batch(workspace: Path, name: str) -> None:
    corpus = str(workspace / "corpus_text_document")
    flags = {**SLM, "load": workspace / "base", "transformer_impl": "local", **RUNS[name]}
    argv = [sys.executable, "-c", WATCHED_TRAINER, *command(corpus, None, **flags)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("WAITS")]
    assert len(steps) == SLM["train_iters"]
    for waits in steps[1:]:  # constants are read in the first one
        assert len(waits) <= GLOBAL_BATCH // BATCH + 3, waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
def test_gpu_agrees_with_cpu(workspace: Path, name: str, precision: str) -> None:
    corpus = str(workspace / "corpus_text_document")
    flags: dict[str, Any] = {**SLM, "load": workspace / "base", "transformer_impl": "local", **RUNS[name]}
    if precision == "bf16":
        flags |= {"bf16": True, "use_distributed_optimizer": True}
    for place, devices in (("cpu", ""), ("gpu", None)):
        train(command(corpus, workspace / f"{name}-{precision}-{place}", **flags), devices=devices)
    tolerance = 1e-3 if precision == "fp32" else 2e-2
    cpu, gpu = (records(workspace / f"{name}-{precision}-{place}") for place in ("cpu", "gpu"))
    for one, other in zip(cpu, gpu, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * tolerance)
        assert other["share_selected"] == pytest.approx(one["share_selected"], abs=0.01)
