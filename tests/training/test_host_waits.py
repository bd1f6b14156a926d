"""Test that the host waits for the device at most once per micro-batch, in every mode."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_slm.objective.linear_cross_entropy import chunked
from megatron_slm.runtime.host_reads import HostReads
from megatron_slm.testing.host_waits import counted_waits
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.testing.tiny import BATCH, GLOBAL_BATCH, MODEL, captured, command, make_corpus
from megatron_slm.training import loop

MICRO_BATCHES = 2 * GLOBAL_BATCH // BATCH
PER_STEP = 2  # the sums of the step, and a state of the selection
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
SLM: dict[str, Any] = {"objective": "slm", "slm_score": "token-loss"}
RUNS: dict[str, dict[str, Any]] = {
    "CLM": {"objective": "clm"},
    "exact": SLM,
    "saved logits": {**SLM, "slm_saved_logits_mb": 64},
    "speculative": {**SLM, "slm_exact_mode": "speculative"},
    "global batch": {**SLM, "slm_scope": "global-batch"},
    "predicted": {**SLM, "slm_scope": "global-batch", "slm_threshold": "predicted"},
    "random, mixed": {**SLM, "slm_score": "random", "slm_mix": 0.1},
    "filtered": {**SLM, "slm_backward": "filtered"},
    "recompute, filtered": {**SLM, **RECOMPUTE, "slm_backward": "filtered"},
    "documents": {**SLM, **DOCUMENTS},
    "reference model": {"objective": "slm"},
    "experts": {**SLM, **EXPERTS},
    "MTP": {**SLM, "mtp_num_layers": 2},
    "MTP, speculative": {**SLM, "mtp_num_layers": 2, "slm_exact_mode": "speculative"},
}
PIPELINE = {"pipeline_model_parallel_size": 2}
OVERLAP = dict.fromkeys(("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), True)
LAYOUTS: dict[str, dict[str, Any]] = {
    "pipeline, filtered": {**SLM, **PIPELINE, "slm_backward": "filtered"},
    "pipeline, reference model in bubbles": {"objective": "slm", **PIPELINE, "reference_in_bubbles": True},
    "interleaved": {
        **SLM,
        **PIPELINE,
        **OVERLAP,
        "slm_scope": "global-batch",
        "num_layers": 4,
        "num_layers_per_virtual_pipeline_stage": 1,
    },
    "tensor, filtered": {**SLM, "tensor_model_parallel_size": 2, "sequence_parallel": True, "slm_backward": "filtered"},
    "context": {**SLM, "context_parallel_size": 2},
}
OF_CORE = (  # waits of Megatron-Core per step, of its experts, and of torch's optimizer, whose steps are on the host
    *("megatron/core/distributed/finalize_model_grads.py", "megatron/core/optimizer/", "megatron/core/utils.py"),
    "megatron/core/transformer/moe/",
)


def count_steps(rank: int, world_size: int, commands: list[list[str]]) -> list[list[Counter[str]]]:
    """Train with each command, and return the waits of each step of each run."""
    with shared_process_group() if world_size > 1 else nullcontext():
        return [_count_run(argv) for argv in commands]


def _count_run(argv: list[str]) -> list[Counter[str]]:
    steps: list[Counter[str]] = []
    train_step = loop.train_step

    def counted(*args: Any, **options: Any) -> Any:
        with counted_waits() as counts:
            step = train_step(*args, **options)
        steps.append(counts)
        return step

    on_gpu = mock.patch.dict(chunked.FIXED_SIZE, cpu=True)
    with mock.patch.object(loop, "train_step", counted), on_gpu:
        outcome = captured(argv)
    assert outcome.code == 0, outcome.errors
    return steps


def test_at_most_one_wait_per_micro_batch(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", 1)
    model = ["--num-layers", "1", *MODEL[2:]]
    base = command(corpus, tmp_path / "base", model=model, train_iters=1)
    runs = {**RUNS, "reference model": {**RUNS["reference model"], "reference_load": tmp_path / "base"}}
    commands = [command(corpus, dp=2, model=model, train_iters=2, **flags) for flags in runs.values()]
    _, *counted = run_ranks(count_steps, 1, [base, *commands], initialize=False)[0]
    for name, steps in zip(runs, counted, strict=True):
        count, report = our_waits(steps)
        assert MICRO_BATCHES <= count <= MICRO_BATCHES + PER_STEP, name + report


def our_waits(steps: list[Counter[str]]) -> tuple[int, str]:
    """Return the number of waits of the second step that are not Megatron-Core's, and their places."""
    _, waits = steps  # constants are read in the first one
    ours = {place: count for place, count in waits.items() if not any(core in place for core in OF_CORE)}
    return sum(ours.values()), "".join(f"\n{count:6} {place}" for place, count in sorted(ours.items()))


def test_at_most_one_wait_per_micro_batch_on_two_ranks(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", 1)
    base = command(corpus, tmp_path / "base", train_iters=1, num_layers=2, **PIPELINE)
    name = "pipeline, reference model in bubbles"
    runs = {**LAYOUTS, name: {**LAYOUTS[name], "reference_load": tmp_path / "base"}}
    commands = [command(corpus, dp=2, train_iters=2, **{"num_layers": 2, **flags}) for flags in runs.values()]
    for _, *counted in run_ranks(count_steps, 2, [base, *commands], initialize=False):
        for name, steps in zip(runs, counted, strict=True):
            count, report = our_waits(steps)
            assert 1 <= count <= MICRO_BATCHES + PER_STEP, name + report


def test_waits_are_counted_at_their_lines() -> None:
    values, mask = torch.arange(4.0, requires_grad=True), torch.tensor([True, False, True, False])
    with counted_waits() as counts:
        (values[mask] * 2).sum().backward()  # outside of the packages
        chunked.row_indices(mask, 2)
        int(HostReads().request(mask.sum()))
        values.detach()[mask] = 0.0  # filled in
        values.detach().index_fill_(0, torch.tensor([1]), 1.0)
        values.detach().nanmedian()
    places = {place.partition(":")[0]: count for place, count in counts.items()}
    outside = {f"{name} outside of the packages": 1 for name in ("index", "index_put", "nanmedian")}
    assert places == {**outside, "tolist at megatron_slm/runtime/host_reads.py": 1}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pending_reads_are_read_together(count: int) -> None:
    reads = HostReads()
    later = [reads.request(torch.arange(size)) for size in range(count)]
    with counted_waits() as counts:
        assert int(reads.request(torch.tensor(2**31 + 1))) == 2**31 + 1
        assert [read.numbers() for read in later] == [list(range(size)) for size in range(count)]
    assert counts.total() == 1
