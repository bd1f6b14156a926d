"""Command line: Megatron-LM's names, fast torch-free parsing, precedence default < recipe < flag, round trips."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    config = parse(["--config", str(recipe), "--num-layers", "5", "--no-swiglu", "--no-save-optim"]).config
    assert (config.model.num_layers, config.optimizer.lr, config.model.swiglu) == (5, 1e-4, False)
    assert config.data.valid_data_path == {"clean": ["a"], "raw": ["0.3", "b", "0.7", "c"]}
    assert config.model.hidden_dropout == 0.1 and not config.checkpoint.save_optim


def test_named_validation_sets() -> None:
    config = parse(["--valid-data-path", "clean=/a", "raw=0.3", "b", "0.7", "c=d/e"]).config
    assert config.data.valid_data_path == {"clean": ["/a"], "raw": ["0.3", "b", "0.7"], "c": ["d/e"]}
    assert parse(["--valid-data-path", "p"]).config.data.valid_data_path == {"valid": ["p"]}
    with pytest.raises(ConfigError, match="given twice"):
        parse(["--valid-data-path", "a=1", "a=2"])


def test_megatrons_spelling_of_negative_and_odd_flags() -> None:
    config = parse(["--no-load-optim", "--override-opt_param-scheduler", "--disable-bias-linear"]).config
    assert not config.checkpoint.load_optim
    assert config.optimizer.override_opt_param_scheduler and config.model.disable_bias_linear


@pytest.mark.parametrize("flag", ["--decoupled-lr", "--inference-max-requests"])
def test_unsupported_megatron_flags_are_named(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is a Megatron-LM flag that is not supported"):
        parse([flag, "1"])


def test_abbreviations_are_refused() -> None:
    with pytest.raises(ConfigError, match="--num-lay is unknown"):
        parse(["--num-lay", "3"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world-size", "8"], "--world-size is for --dry-run. Start the ranks of a run with torchrun or srun."),
        (["--dry-run", "--world-size", "0"], "--world-size is 0, and must be above 0."),
        (["--dry-run", "--world-size", "eight"], "--world-size must be an integer, not 'eight'."),
    ],
)
def test_world_size_of_a_dry_run(flags: list[str], message: str) -> None:
    assert parse(["--dry-run", "--world-size", "64"]).world_size == 64
    with pytest.raises(ConfigError) as caught:
        parse(flags)
    assert str(caught.value) == message


def test_a_switch_with_a_value_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"--swiglu.*a switch takes no value"):
        parse(["--swiglu=true"])
