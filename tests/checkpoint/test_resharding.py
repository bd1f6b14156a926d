"""Test that weights and optimizer state keep every bit when they are loaded and saved in other layouts."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.dist_checkpointing.serialization import load_plain_tensors

from megatron_slm.config.flags import parse
from megatron_slm.runtime import process
from megatron_slm.runtime.console import make_console
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, make_corpus
from megatron_slm.tokenizers.tokenizer import build_run_tokenizer
from megatron_slm.training.preflight import resolve_values
from megatron_slm.training.saver import Saver
from megatron_slm.training.setup import build_run, parallel_layout

pytestmark = pytest.mark.slow

RANKS = 4
SHARED = {"eval_iters": 0, "use_distributed_optimizer": True, "vocab_size": 512}  # one padded vocabulary for every TP
DENSE = {**SHARED, "bf16": True}
EXPERTS = {**SHARED, "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 1e-2}


class Layout(NamedTuple):
    """Parallel sizes with a product of four; EP divides DP x CP."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1

    def flags(self) -> dict[str, Any]:
        sizes = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
        }
        return sizes | ({"sequence_parallel": True} if self.tp > 1 else {})


def layouts(*, experts: bool) -> list[Layout]:
    """Return all layouts on four ranks."""
    sizes = (1, 2, 4)
    found = [Layout(*each) for each in itertools.product(sizes, repeat=4)]
    found = [each for each in found if each.tp * each.pp * each.cp * each.dp == RANKS]
    if not experts:
        return found
    plain = [each for each in found if each.cp == 1]
    return [each._replace(ep=ep) for each in plain for ep in sizes if each.dp % ep == 0]


Pair = tuple[Layout, Layout]
FEW: list[Pair] = [
    (Layout(tp=4), Layout(pp=4)),
    (Layout(dp=4), Layout(tp=2, pp=2)),
    (Layout(tp=2, cp=2), Layout(pp=2, dp=2)),
]


def test_some_layouts_keep_every_bit(tmp_path: Path) -> None:
    assert_bits_kept(tmp_path, "dense", DENSE, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_every_pair_of_layouts_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    has_experts = kind == "experts"
    pairs = list(itertools.permutations(layouts(experts=has_experts), 2))
    assert_bits_kept(tmp_path, kind, EXPERTS if has_experts else DENSE, pairs)


def assert_bits_kept(directory: Path, kind: str, model: dict[str, Any], pairs: list[Pair]) -> None:
    """Train a base on one rank; save it in each first layout; load that in the second layout, and save it again."""
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / kind, train_iters=2, **model))

    def reshard(load: str, layout: Layout, save: str) -> None:
        # New ranks every time: no run inherits process groups of another layout.
        arguments = (corpus, directory / kind, directory / load, directory / save, layout, model)
        for different in run_ranks(_reshard, RANKS, *arguments, initialize=False, timeout=120):
            assert not different, (load, layout)

    for source in dict.fromkeys(first for first, _ in pairs):
        reshard(kind, source, f"{source}")
    for source, target in pairs:
        reshard(f"{source}", target, "resaved")
        shutil.rmtree(directory / "resaved")


def _reshard(
    rank: int, world_size: int, corpus: str, base: Path, load: Path, save: Path, layout: Layout, model: dict[str, Any]
) -> set[str]:
    """Resume a run in a layout, save it without a step, and return the keys of tensors that differ from the base's."""
    argv = command(corpus, save, dp=layout.dp, train_iters=2, load=load, **model, **layout.flags())
    config = resolve_values(parse(argv).config, RANKS)
    groups = process.start(parallel_layout(config))
    console = make_console(enabled=False)
    run = build_run(config, build_run_tokenizer(config), groups, console)
    assert run.progress.step == 2
    Saver(run.state, run.config, console).save()
    expected, found = _tensors(base), _tensors(save)
    process.stop()
    assert any("exp_avg_sq" in key for key in expected)
    same = {key for key in expected.keys() & found.keys() if torch.equal(found[key], expected[key])}
    return (expected.keys() | found.keys()) - same


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_plain_tensors(str(run / "iter_0000002"))
    return {key: value for key, value in tensors.items() if torch.is_tensor(value)}
