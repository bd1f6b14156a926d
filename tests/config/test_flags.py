"""Command line: Megatron-LM's names, fast torch-free parsing, precedence default < recipe < flag, round trips."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_slm.config.checks import resolve
from megatron_slm.config.constraints import flag_name
from megatron_slm.config.flags import parse
from megatron_slm.config.megatron_lm.refused import megatron_flags
from megatron_slm.config.recipe import settings
from megatron_slm.runtime.errors import ConfigError

PROJECT_PREFIXES = (
    "--slm-",
    "--reference-",
    "--replay-",
    "--objective",
    "--eod-id",
    "--data-order",
    "--activation",
    "--keep-last",
    "--eval-tasks",
    "--tasks-dir",
)
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_help_is_fast_and_imports_no_torch() -> None:
    code = "import sys; from megatron_slm.cli.pretrain import main\ntry: main(['--help'])\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules and 'megatron.core' not in sys.modules"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--num-layers" in result.stdout and "--slm-selection-ratio" in result.stdout
    assert time.monotonic() - began < 5  # a tenth of a second on an idle machine


@pytest.mark.parametrize("flag", [flag_name(s) for _, s, _ in settings()])
def test_every_flag_is_megatrons_or_has_a_project_prefix(flag: str) -> None:
    ours = flag.startswith(PROJECT_PREFIXES) or flag in ("--trust-checkpoint", "--require-fused")
    negative = flag.replace("--", "--no-", 1)
    assert ours or flag in megatron_flags() or negative in megatron_flags(), flag


def test_flag_wins_over_recipe_over_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num-layers: 3\nlr: 1e-4\nswiglu: yes\nvalid_data_path: {clean: a, raw: [0.3, b, 0.7, c]}\n")
    data = ["--data-path", "x"] if "sft" in recipe.stem else ["--mock-data"]  # mock data have no answers
    config = parse(["--config", str(recipe), *data, "--slm-score", "token-loss"]).config
    assert config.model.num_layers or recipe.stem in ("pretraining", "training")
    if recipe.parent.name == "runs" and recipe.stem != "pretraining":
        resolve(config, world_size=config.parallel.tensor_model_parallel_size)


def test_a_switch_with_a_value_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"--swiglu.*a switch takes no value"):
        parse(["--swiglu=true"])
