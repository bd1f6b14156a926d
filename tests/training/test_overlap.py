"""Settings of overlapped communication reach Megatron-Core's configurations as in Megatron-LM."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_slm.config.flags import parse
from megatron_slm.config.schema import RunConfig
from megatron_slm.model.gpt import transformer_config
from megatron_slm.testing.ranks import run_ranks, shared_process_group
from megatron_slm.testing.tiny import captured, command, losses, make_corpus
from megatron_slm.training import optimizer
from megatron_slm.training.optimizer import build_optimizer, data_parallel_config
from megatron_slm.training.state import TrainState

MODEL = "--num-layers 8 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --pipeline-model-parallel-size 2"
INTERLEAVED = "--num-layers-per-virtual-pipeline-stage 1"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


def settings(flags: str) -> RunConfig:
    return parse(f"{MODEL} {flags}".split()).config


@pytest.mark.parametrize(
    ("flags", "overlaps", "warmup_flush"),
    [
        ("", False, False),
        (INTERLEAVED, True, False),
        (f"{INTERLEAVED} --overlap-p2p-communication-warmup-flush", True, True),
        (f"{INTERLEAVED} --no-overlap-p2p-communication", False, False),
        ("--overlap-p2p-communication-warmup-flush", False, False),  # a reference model without virtual stages
    ],
)
def test_pipeline_communication(flags: str, overlaps: bool, warmup_flush: bool) -> None:
    config, groups = settings(flags), SimpleNamespace(device=torch.device("cpu"))
    arguments: Any = (config.model, config.parallel, config.training, groups, "local")
    found = transformer_config(*arguments, params_dtype="fp32")
    assert found.overlap_p2p_comm is overlaps and found.batch_p2p_comm is not overlaps
    assert found.overlap_p2p_comm_warmup_flush is warmup_flush
    assert found.deallocate_pipeline_outputs is not overlaps, "on a CPU"
    assert not found.batch_p2p_sync, "the host would wait for the device after each message"


@pytest.mark.parametrize(
    ("flags", "syncs_gradients", "gathers_aligned"),
    [
        ("", False, False),
        (INTERLEAVED, False, False),
        (OVERLAP, True, False),
        (f"{OVERLAP} {INTERLEAVED}", True, True),
        (f"{OVERLAP} {INTERLEAVED} --no-align-param-gather", True, False),
        (f"{OVERLAP} {INTERLEAVED} --no-align-grad-reduce", False, True),
        (f"{OVERLAP} --disable-align-grad-reduce", False, False),
    ],
)
def test_stages_start_communication_together(flags: str, syncs_gradients: bool, gathers_aligned: bool) -> None:
    config, schedule = settings(flags), SimpleNamespace(no_sync_func=None, grad_sync_func=None, param_sync_func=None)
    chunks: Any = [SimpleNamespace(no_sync=1, start_grad_sync=2)] * 2
    built = SimpleNamespace(scale_loss=None)
    with (
        mock.patch.multiple(optimizer, get_megatron_optimizer=lambda *_: built),
        mock.patch.multiple(optimizer, repair_loading=lambda _: None, fuse_torch_adam=lambda _: None),
        mock.patch.multiple(optimizer, model_config=lambda _: schedule, optimizer_config=lambda _: None),
    ):
        build_optimizer(chunks, config)
    assert data_parallel_config(config).align_param_gather is gathers_aligned
    assert schedule.no_sync_func == ([1, 1] if config.parallel.overlap_grad_reduce else None)
    assert schedule.grad_sync_func == ([2, 2] if syncs_gradients else None)
    assert len(schedule.param_sync_func or []) == (2 if gathers_aligned else 0)


def _gathers(rank: int, world_size: int, commands: list[list[str]]) -> list[tuple[int, str, list[int]]]:
    """Run the trainer; return exit codes, errors, and the number of gathers of each bucket in each step."""
    zero_grad, start, steps = TrainState.zero_grad, _ParamAndGradBucketGroup.start_param_sync, list[Counter[int]]()
    outcomes: list[tuple[int, str, list[int]]] = []

    def begin_step(state: TrainState) -> None:
        steps.append(Counter())
        zero_grad(state)

    def counted(bucket: Any, force_sync: bool = False) -> None:
        steps[-1][id(bucket)] += not force_sync
        start(bucket, force_sync=force_sync)

    with (
        shared_process_group(),
        mock.patch.object(TrainState, "zero_grad", begin_step),
        mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", counted),
    ):
        for argv in commands:
            steps.clear()
            outcome = captured(argv)
            outcomes.append((outcome.code, outcome.errors, [count for step in steps for count in step.values()]))
    return outcomes


def test_each_step_gathers_parameters_once(tmp_path: Path) -> None:
    """A ranking pass gathers the parameters that it needs, and the interleaved schedule those that are missing."""
    layout = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "num_layers": 4}
    flags = {"objective": "slm", "slm_score": "token-loss", "slm_scope": "global-batch", **layout}
    flags |= {"train_iters": 2, "losses_only": True, "use_distributed_optimizer": True}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    corpus = make_corpus(tmp_path / "corpus", 1)
    commands = [command(corpus, tmp_path / "plain", **flags), command(corpus, tmp_path / "overlap", **flags, **overlap)]
    for outcomes in run_ranks(_gathers, 2, commands, initialize=False):
        for code, errors, _ in outcomes:
            assert code == 0, errors
        counts = outcomes[1][2]
        assert len(counts) >= 4 and set(counts) == {1}
    assert losses(tmp_path / "overlap") == losses(tmp_path / "plain")


def _run_each(rank: int, world_size: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    with shared_process_group():
        outcomes = [captured(argv) for argv in commands]
    return [(outcome.code, outcome.errors) for outcome in outcomes]


@pytest.mark.slow
def test_overlap_changes_no_loss(tmp_path: Path) -> None:
    """Two stages exchange messages with one rank in both directions, in each schedule."""
    corpus = make_corpus(tmp_path / "corpus", 1)
    shared = {"pipeline_model_parallel_size": 2, "train_iters": 3, "eval_iters": 0, "use_distributed_optimizer": True}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    interleaved = {"num_layers_per_virtual_pipeline_stage": 1}
    runs: dict[str, dict[str, Any]] = {
        "plain": {},
        "aligned": overlap,
        "not aligned": {**overlap, "no_align_grad_reduce": True},
        "interleaved": interleaved,
        "warm-up": {**interleaved, **overlap, "overlap_p2p_communication_warmup_flush": True},
        "interleaved, not aligned": {
            **interleaved,
            **overlap,
            "no_align_grad_reduce": True,
            "no_align_param_gather": True,
        },
    }
    commands = [command(corpus, tmp_path / name, **shared, **flags) for name, flags in runs.items()]
    outcomes = run_ranks(_run_each, 2, commands, initialize=False)[0]
    for name, (code, errors) in zip(runs, outcomes, strict=True):
        assert code == 0, (name, errors)
    for group in (("plain", "aligned", "not aligned"), ("interleaved", "warm-up", "interleaved, not aligned")):
        first, *others = (losses(tmp_path / name) for name in group)
        assert others == [first, first], group
