"""The command tools/plan_run.py: plans, their recipes, and runs that do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.cli.plan_run import main
from megatron_slm.config.flags import parse
from megatron_slm.planning.search import _divisors
from megatron_slm.testing.tiny import captured
from megatron_slm.training.preflight import resolve_values

MODEL = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 8,
    "seq_length": 4096,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "vocab_size": 32000,
    "untie_embeddings_and_output_weights": True,
    "tokenizer_type": "NullTokenizer",
}
RUN = {"objective": "slm", "global_batch_size": 256, "train_iters": 1000, "lr": 1e-5, "bf16": True}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MODEL | RUN | SHARDED), encoding="utf-8")
    return path


def plan(*argv: object) -> dict[str, Any]:
    outcome = captured(["--json", *map(str, argv)], main)
    assert outcome.code == 0, outcome.errors
    return json.loads(outcome.output)


@pytest.mark.parametrize("gpus", [4, 32])
def test_the_plan_is_a_valid_run(recipe: Path, tmp_path: Path, gpus: int) -> None:
    layout = tmp_path / "layout.yaml"
    found = plan("--config", recipe, "--gpus", gpus, "--output", layout)["plan"]
    given = ["--config", str(recipe), str(layout), "--mock-data", "--reference-load", str(tmp_path)]
    config = resolve_values(parse(given).config, gpus)
    assert found["memory"]["fits"]
    assert config.training.micro_batch_size == found["settings"]["micro_batch_size"]
    assert sum(found["memory"]["parts"].values()) == found["memory"]["total"] <= found["memory"]["usable"]
    assert sum(found["time"]["parts"].values()) == pytest.approx(found["time"]["step"])


def test_the_layout_replaces_that_of_the_recipe(recipe: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout.yaml"
    given = ["--tensor-model-parallel-size", "8", "--sequence-parallel", "--tp-comm-overlap"]
    recomputed = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "4"]
    found = plan("--config", recipe, *given, *recomputed, "--gpus", 8, "--output", layout)
    config = parse(["--config", str(recipe), str(layout)]).config
    assert config.parallel.tensor_model_parallel_size < 8
    assert config.training.recompute_granularity is None
    assert {"settings", "reason"} == set(found["rejected"][0])
    assert any("recompute_granularity" in rejection["settings"] for rejection in found["rejected"])


def test_a_run_that_does_not_fit_is_explained(recipe: Path) -> None:
    outcome = captured(["--config", str(recipe), "--no-use-distributed-optimizer", "--no-overlap-param-gather"], main)
    assert outcome.code == 2
    assert "no layout fits" in outcome.output
    assert "does not fit on 1 h100" in outcome.errors
    remedies = outcome.output.splitlines()[1:]
    assert remedies[0].startswith("  --use-distributed-optimizer: not sufficient")
    assert "fits" in remedies[-1]
    assert remedies[-1].startswith("  --gpus ")


def test_a_layout_as_given_is_planned_without_a_search(recipe: Path) -> None:
    given = ["--config", recipe, "--no-search", "--gpus", 8, "--gpu", "H100", "--tensor-model-parallel-size", 2]
    found = plan(*given, "--sequence-parallel", "--micro-batch-size", 1)["plan"]
    assert (found["layout"]["tensor"], found["layout"]["data"]) == (2, 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--gpus", "1000000000"], "below 10,000,000"),
        (["--write-gb-per-second", "1e-320"], "--write-gb-per-second 1e-320 must be at least 0.001"),
        (["--write-gb-per-second", "nan"], "--write-gb-per-second nan must be at least 0.001"),
        (["--gpu", "h100", "--fp8-format", "hybrid", "--no-bf16", "--no-search"], "needs --bf16"),
        (["--gpu", "a100", "--fp8-format", "hybrid", "--no-search"], "a100 has no fp8"),
        (["--no-search", "--tensor-model-parallel-size", "5", "--gpus", "5"], "does not divide"),
        (["--gpus", "48"], "--global-batch-size 256 is not a multiple of the data-parallel ranks of any layout"),
        (["--slm-selction-ratio", "0.5"], "Did you mean"),
    ],
)
def test_mistakes_are_reported(recipe: Path, argv: list[str], message: str) -> None:
    outcome = captured(["--config", str(recipe), "--gpus", "8", "--json", *argv], main)
    assert outcome.code == 2
    assert message in outcome.errors
    assert message in json.loads(outcome.output)["error"]


def test_divisors_of_large_numbers_take_no_time() -> None:
    assert _divisors(10**12, 8) == [1, 2, 4, 5, 8] and _divisors(36, 36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_the_batch_size_is_required(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MODEL | {"lr": 1e-5, "train_iters": 10}), encoding="utf-8")
    outcome = captured(["--config", str(path)], main)
    assert outcome.code == 2
    assert "--global-batch-size" in outcome.errors


def test_another_file_is_not_replaced(recipe: Path, tmp_path: Path) -> None:
    outcome = captured(["--config", str(recipe), "--no-search", "--gpus", "64", "--output", str(recipe)], main)
    assert outcome.code == 2
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["num_layers"] == 32


def test_a_smaller_reference_model_needs_less_memory(recipe: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(MODEL | {"num_layers": 16}), encoding="utf-8")
    given = ["--config", recipe, "--no-search", "--gpus", 64, "--micro-batch-size", 1, "--reference-load", "rm"]
    given += ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    whole, half = plan(*given)["plan"], plan(*given, "--reference-config", small)["plan"]
    parts = whole["memory"]["parts"]["reference model"], half["memory"]["parts"]["reference model"]
    assert parts[1] < 0.6 * parts[0]
    assert half["time"]["parts"]["reference"] < 0.6 * whole["time"]["parts"]["reference"]


def test_several_reference_models_add_up(recipe: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(MODEL | {"num_layers": 16}), encoding="utf-8")
    given = ["--config", recipe, "--no-search", "--gpus", 64, "--micro-batch-size", 1]
    given += ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--reference-config"]
    one, other, both = (plan(*given, *recipes)["plan"] for recipes in ([recipe], [small], [recipe, small]))
    memory = [each["memory"]["parts"]["reference model"] for each in (one, other, both)]
    times = [each["time"]["parts"]["reference"] for each in (one, other, both)]
    assert memory[2] == memory[0] + memory[1]
    assert times[2] == pytest.approx(times[0] + times[1])
    code, _, errors = captured([*map(str, (*given, recipe, small)), "--reference-load", "rm"], main)
    assert code == 2 and "--reference-config has 2 recipes, and --reference-load 1 models" in errors
    code, _, errors = captured([*map(str, (*given, recipe, small)), "--reference-history", "start"], main)
    assert code == 2 and "--reference-config has 2 recipes, and --reference-load 0 models" in errors


def test_the_planner_imports_no_torch() -> None:
    code = "import sys, megatron_slm.cli.plan_run; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_reference_model_of_a_directory_is_planned(recipe: Path, tmp_path: Path) -> None:
    directory = tmp_path / "published"
    directory.mkdir()
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "hidden_act": "silu",
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(model), encoding="utf-8")
    given = ["--config", recipe, "--no-search", "--gpus", 64, "--micro-batch-size", 1, "--reference-load", directory]
    found = plan(*given)["plan"]
    assert found["memory"]["parts"]["reference model"] == 2 * 1_100_048_384
    given = [*given[:-2], "--tensor-model-parallel-size", 2, "--sequence-parallel", "--reference-load"]
    plans = [plan(*given, *models)["plan"] for models in ([directory], ["absent"], [directory, "absent"])]
    parts = [each["memory"]["parts"]["reference model"] for each in plans]
    assert parts[2] == parts[0] + parts[1] != 2 * parts[1]
