"""Test that training leaves the co-located reference model bitwise unchanged, and refuses other layouts."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_slm.config.flags import parse
from megatron_slm.reference.replica import _check_shape
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import MODEL, command, launch, make_corpus


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a corpus and a reference model whose depth and width differ from the training model's."""
    directory = tmp_path_factory.mktemp("replica")
    corpus = make_corpus(directory / "corpus", 1)
    launch(command(corpus, directory / "rm", train_iters=2, num_layers=2, hidden_size=16))
    return directory


def _random_numbers_after_build(rank: int, world_size: int, argv: list[str]) -> list[Any]:
    """Return the next random number of each generator used in a step, after the run is built."""
    with _built_run(argv) as run:
        assert run.state.progress.step == 0
        numbers: list[Any] = [random.random(), np.random.rand(), torch.rand(1).item()]
        with get_cuda_rng_tracker().fork():
            return [*numbers, torch.rand(1).item()]


def test_building_the_reference_model_preserves_random_states(workspace: Path) -> None:
    """Dropout is independent of the source of reference scores."""
    argv = command(str(workspace / "corpus_text_document"), train_iters=2, objective="slm")
    variants = ([*argv, "--slm-score", "token-loss"], [*argv, "--reference-load", str(workspace / "rm")])
    [without], [with_model] = (run_ranks(_random_numbers_after_build, 1, each, initialize=False) for each in variants)
    assert with_model == without


@contextlib.contextmanager
def _built_run(argv: list[str]) -> Iterator[Any]:
    from megatron_slm.config.checks import resolve
    from megatron_slm.config.flags import parse
    from megatron_slm.runtime import process
    from megatron_slm.runtime.console import make_console
    from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer
    from megatron_slm.training.setup import build_run, parallel_layout

    config = resolve(parse(argv).config, int(os.environ["WORLD_SIZE"]))
    groups = process.start(parallel_layout(config), seed=config.training.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        yield build_run(config, build_tokenizer("ByteTokenizer", TokenizerFiles()), groups, make_console(False))
    process.stop()


def _train_with_reference(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    from megatron_slm.training.loop import train

    with _built_run(argv) as run:
        reference = run.reference.__self__  # the replica
        before = [parameter.clone() for chunk in reference.chunks for parameter in chunk.parameters()]
        train(run)
        after = [parameter for chunk in reference.chunks for parameter in chunk.parameters()]
        return {
            "unchanged": all(torch.equal(old, new) for old, new in zip(before, after, strict=True)),
            "count": len(after),
            "gradients": [p for p in after if p.requires_grad or p.grad is not None or hasattr(p, "main_grad")],
            "trained": sum(p.numel() for chunk in run.state.model_chunks for p in chunk.parameters()),
            "training": any(chunk.training for chunk in reference.chunks),
        }


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_reference_model_is_bitwise_unchanged(workspace: Path, tmp_path: Path, tp: int, pp: int) -> None:
    argv = command(str(workspace / "corpus_text_document"), train_iters=2, objective="slm")
    argv += ["--reference-load", str(workspace / "rm"), "--hidden-dropout", "0.1"]
    argv += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    for result in run_ranks(_train_with_reference, tp * pp, argv, initialize=False):
        assert result["unchanged"] and result["count"] > 0
        assert not result["gradients"] and not result["training"]


@pytest.mark.parametrize(
    "style",
    [
        ["--normalization", "LayerNorm", "--position-embedding-type", "learned_absolute", "--no-swiglu"],
        ["--bf16", "--qk-layernorm"],
    ],
    ids=["GPT-2 style", "bf16"],
)
def test_loss_decreases_for_other_model_styles(workspace: Path, tmp_path: Path, style: list[str]) -> None:
    """GPT-2 style with tied embeddings, biases and dropout; bf16 with fp32 master weights."""
    from megatron_slm.testing.tiny import records

    model = [flag for flag in MODEL if style[0] == "--bf16" or flag != "--untie-embeddings-and-output-weights"]
    argv = command(str(workspace / "corpus_text_document"), tmp_path / "run", model=model, train_iters=8)
    launch([*argv, *style])
    steps = records(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5


def test_expert_parallelism_must_divide_the_experts() -> None:
    argv = command("corpus", moe_router_topk=1, moe_ffn_hidden_size=32, expert_model_parallel_size=2)
    reference, config = (parse([*argv, "--num-experts", str(count)]).config for count in (3, 4))
    _check_shape(config, config, "--reference-load rm")
    with pytest.raises(
        ConfigError, match=r"^--reference-load rm: .* 3 experts, which --expert-model-parallel-size = 2 does not divide"
    ):
        _check_shape(reference, config, "--reference-load rm")
