"""Table of implementations: found in the objects of the run, merged over ranks, required by --require-fused."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.model import specs
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import MODEL, captured, command, make_corpus, run_each
from megatron_slm.training import implementations, setup
from megatron_slm.training.expected_implementations import expected_obstacles
from megatron_slm.training.implementations import (
    Implementation,
    _attention_and_norms,
    _fp8,
    _weight_gradients,
    merge_ranks,
    report_implementations,
)

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("table") / "corpus", 1)


def run(corpus: str, directory: Path, **flags: object) -> list[str]:
    return command(corpus, directory, train_iters=1, eval_iters=0, num_layers=1, **flags)


def test_table_and_requirements_of_a_cpu(corpus: str, tmp_path: Path) -> None:
    required = ["linear", "lm-head", "tp-comm"]
    plain, refused, planned, elsewhere, accepted = run_each(
        run(corpus, tmp_path / "plain", position_embedding_type="rope"),
        run(corpus, tmp_path / "refused", require_fused=required),
        run(corpus, tmp_path / "planned", require_fused=required, dry_run=True),
        run(corpus, tmp_path / "elsewhere", require_fused=required, dry_run=True, world_size=2),
        run(corpus, tmp_path / "accepted", require_fused=["reference", "tp-comm", "grad-reduce"], bf16=True),
    )
    assert plain.code == accepted.code == 0, plain.errors + accepted.errors
    (row,) = [line for line in plain.output.partition("implementations\n")[2].splitlines() if "lm-head" in line]
    assert "chunked linear cross-entropy" in row and "scaled_dot_product" not in plain.output
    assert "one rank" in accepted.output, "a required part is shown"
    assert refused.code == planned.code == 2 and "Traceback" not in refused.errors + planned.errors
    for text in ("linear: torch (ColumnParallelLinear, RowParallelLinear)", "it is not installed", "lm-head: chunked"):
        assert text in refused.errors
    for text in ("linear: Transformer Engine: it is not installed", "lm-head: --slm-cross-entropy chunked"):
        assert text in planned.errors
    assert elsewhere.code == 0, elsewhere.errors
    assert "this machine cannot run it: --require-fused: the fastest implementation is not used" in elsewhere.output
    assert "tp-comm:" not in refused.errors + planned.errors and not (tmp_path / "refused").exists()


SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"reset_position_ids": True, "reset_attention_mask": True, "position_embedding_type": "rope"}),
    (1, {"slm_backward": "filtered", "objective": "slm", "slm_score": "token-loss"}),
    (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "dp": 2}),
]


def _found_and_expected(rank: int, world_size: int, argv: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    found: dict[str, str] = {}

    def report(here: list[Implementation], required: list[str], device: torch.device, console: Console) -> None:
        found.update({each.part: each.obstacle for each in here})

    with mock.patch.object(setup, "report_implementations", report):
        outcome = captured(argv)
    assert outcome.code == 0, outcome.errors
    config = resolve(parse(argv).config, world_size)
    return found, expected_obstacles(config, torch.device("cpu"), world_size)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), SETTINGS)
def test_expected_obstacles_are_those_of_the_run(ranks: int, flags: dict[str, Any], corpus: str) -> None:
    argv = command(corpus, train_iters=1, eval_iters=0, num_layers=4, **flags)
    found, expected = run_ranks(_found_and_expected, ranks, argv, initialize=False)[-1]
    assert found.keys() == expected.keys()
    assert {part for part in found if found[part]} == {part for part in expected if expected[part]}


def test_expected_obstacles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "engine_problem", lambda: None)
    flags = [*MODEL, "--bf16", "--fp8-format", "hybrid", "--slm-cross-entropy", "chunked"]
    config = parse(flags).config
    obstacles = {part: text for part, text in expected_obstacles(config, torch.device("cuda"), 8).items() if text}
    assert obstacles.keys() == {"lm-head", "grad-reduce"}
    config = parse([*flags, "--no-gradient-accumulation-fusion"]).config
    found = expected_obstacles(config, torch.device("cuda"), 1)["weight-gradient"]
    assert found == "--no-gradient-accumulation-fusion"


def test_fp32_is_an_obstacle_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "engine_problem", lambda: None)
    device = torch.device("cuda")
    obstacles = expected_obstacles(parse([*MODEL, "--lr", "1"]).config, device, 1)
    assert {obstacles[part] for part in ("linear", "attention", "norm")} == {specs.IN_FP32}
    engine = [*MODEL, "--lr", "1", "--transformer-impl", "transformer_engine"]
    obstacles = expected_obstacles(parse(engine).config, device, 1)
    assert (obstacles["linear"], obstacles["attention"]) == ("", specs.IN_FP32)
    attention = type("TEAttention", (), {"__module__": "megatron.core.extensions.transformer_engine"})()
    layers: Any = [SimpleNamespace(self_attention=SimpleNamespace(core_attention=attention))]
    for dtype, obstacle in ((torch.float32, specs.IN_FP32), (torch.bfloat16, "")):
        settings: Any = SimpleNamespace(params_dtype=dtype)
        assert next(_attention_and_norms([], layers, settings, "")).obstacle == obstacle


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    outcome = captured(argv)
    return outcome.code, outcome.errors


def test_requirement_ends_every_rank_of_a_pipeline(corpus: str, tmp_path: Path) -> None:
    """The LM head is on the last stage only, and the first rank prints the table."""
    argv = command(corpus, tmp_path / "run", train_iters=1, num_layers=2, pipeline_model_parallel_size=2)
    outcomes = run_ranks(_main, 2, [*argv, "--require-fused", "lm-head", "p2p-comm"], initialize=False)
    assert [code for code, _ in outcomes] == [2, 2]
    assert "lm-head: chunked" in outcomes[0][1] and "p2p-comm: not overlapped" in outcomes[0][1]


def test_error_texts_are_no_markup() -> None:
    """An import error may contain a path in brackets, which is no style of the console."""
    console = Console(file=io.StringIO(), width=120)
    report_implementations([Implementation("linear", "torch", "undefined symbol [/opt/te.so]")], [], GPU, console)
    assert "[/opt/te.so]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_obstacles_of_weight_gradient_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = type("TELinear", (), {"__module__": "megatron.core.extensions.transformer_engine"})()
    torch_layer, local, gpu = torch.nn.Linear(1, 1), "--transformer-impl local", torch.device("cuda")
    assert _weight_gradients([engine], local, gpu).obstacle == "--no-gradient-accumulation-fusion"
    engine.fuse_wgrad_accumulation = True
    assert _weight_gradients([engine], local, gpu).obstacle == ""
    without_apex = f"{local}; NVIDIA apex's extension is not installed"
    assert _weight_gradients([engine, torch_layer], local, gpu).obstacle == without_apex
    monkeypatch.setattr(implementations, "apex_is_available", True)
    assert _weight_gradients([torch_layer], local, gpu).obstacle == f"{local}; --no-gradient-accumulation-fusion"
    assert _weight_gradients([torch_layer], "no GPU", torch.device("cpu")).obstacle == "no GPU"


def test_weights_in_fp8_do_not_depend_on_the_stage() -> None:
    """The first stage may have layers in bf16 only."""
    settings = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}
    config: Any = SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise", fp8_param=True, num_layers=4, **settings)
    assert _fp8(config, []).used == "tensorwise, hybrid, 2 of 4 layers, weights in FP8"


def test_obstacle_of_one_rank_is_shown() -> None:
    fast, slow = Implementation("linear", "fast"), Implementation("linear", "slow", "reason")
    other = Implementation("norm", "fast")
    assert merge_ranks([[fast, other], [slow]]) == [slow, other]
    assert merge_ranks([[slow], [fast]]) == [slow]
