"""Table of implementations: found in the objects of the run, merged over ranks, required by --require-fused."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megatron_slm.config.schema.training import FUSED_PARTS
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import captured, command, make_corpus, run_each
from megatron_slm.training.implementations import (
    Implementation,
    _fp8,
    _weight_gradients,
    merge_ranks,
    report_implementations,
)

SLOW = ("linear", "attention", "norm", "rope", "weight-gradient", "adam", "lm-head", "fp8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("table") / "corpus", 1)


def run(corpus: str, directory: Path, **flags: object) -> list[str]:
    return command(corpus, directory, train_iters=1, eval_iters=0, num_layers=1, **flags)


def test_table_and_requirements_of_a_cpu(corpus: str, tmp_path: Path) -> None:
    plain, refused, accepted = run_each(
        run(corpus, tmp_path / "plain", position_embedding_type="rope"),
        run(corpus, tmp_path / "refused", require_fused=["linear", "lm-head", "tp-comm"]),
        run(corpus, tmp_path / "accepted", require_fused=["reference", "tp-comm", "grad-reduce"], bf16=True),
    )
    assert plain.code == accepted.code == 0, plain.errors + accepted.errors
    table = plain.output.partition("implementations")[2]
    assert [part for part in FUSED_PARTS if part not in table] == []
    for text in ("scaled_dot_product_attention", "RMSNorm", "AdamW", "chunked linear cross-entropy", "one rank"):
        assert text in table
    assert refused.code == 2 and "Traceback" not in refused.errors
    for text in ("linear: torch (ColumnParallelLinear, RowParallelLinear)", "it is not installed", "lm-head: chunked"):
        assert text in refused.errors
    assert "tp-comm:" not in refused.errors and not (tmp_path / "refused").exists()


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    outcome = captured(argv)
    return outcome.code, outcome.errors


def test_requirement_ends_every_rank_of_a_pipeline(corpus: str, tmp_path: Path) -> None:
    """The LM head is on the last stage only, and the first rank prints the table."""
    argv = command(corpus, tmp_path / "run", train_iters=1, num_layers=2, pipeline_model_parallel_size=2)
    outcomes = run_ranks(_main, 2, [*argv, "--require-fused", "lm-head", "p2p-comm"], initialise=False)
    assert [code for code, _ in outcomes] == [2, 2]
    assert "lm-head: chunked" in outcomes[0][1] and "p2p-comm: not overlapped" in outcomes[0][1]


def test_error_texts_are_no_markup() -> None:
    """An import error may contain a path in brackets, which is no style of the console."""
    console = Console(file=io.StringIO(), width=120)
    report_implementations([Implementation("linear", "torch", "undefined symbol [/opt/te.so]")], [], console)
    assert "[/opt/te.so]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_fallbacks_of_engine_layers_name_another_obstacle() -> None:
    layer = type("TELinear", (), {"__module__": "megatron.core.extensions.transformer_engine"})()
    assert "--transformer-impl" not in _weight_gradients([layer], "--transformer-impl local").obstacle


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
