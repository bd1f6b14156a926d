"""Command line: Megatron-LM's names, fast torch-free parsing, precedence default < recipe < flag, round trips."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.config.checks import resolve
from megatron_slm.config.constraints import flag_name
from megatron_slm.config.flags import parse
from megatron_slm.config.megatron_lm.refused import megatron_flags
from megatron_slm.config.recipe import dump_config, read_config, settings, to_flat_dict, with_settings
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
    ours = flag.startswith(PROJECT_PREFIXES)
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


@hypothesis.settings(deadline=None, max_examples=30)
@given(st.floats(1e-8, 1), st.integers(1, 100), st.booleans(), st.lists(st.text("ab/", min_size=1), max_size=3))
def test_printed_config_is_a_recipe(lr: float, layers: int, switch: bool, blend: list[str]) -> None:
    config = parse(["--lr", repr(lr), "--num-layers", str(layers), "--swiglu" if switch else "--no-swiglu"]).config
    config = with_settings(config, {"data_path": blend})
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(dump_config(config))
        assert to_flat_dict(read_config(path)) == to_flat_dict(config)


def test_megatrons_spelling_of_negative_and_odd_flags() -> None:
    config = parse(["--no-load-optim", "--override-opt_param-scheduler", "--disable-bias-linear"]).config
    assert not config.checkpoint.load_optim
    assert config.optimizer.override_opt_param_scheduler and config.model.disable_bias_linear


@pytest.mark.parametrize("flag", ["--fp16", "--decoupled-lr", "--inference-max-requests"])
def test_unsupported_megatron_flags_are_named(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is a Megatron-LM flag that is not supported"):
        parse([flag, "1"])


def test_abbreviations_are_refused() -> None:
    with pytest.raises(ConfigError, match="--num-lay is unknown"):
        parse(["--num-lay", "3"])


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid(recipe: Path) -> None:
    config = parse(["--config", str(recipe), "--mock-data", "--slm-score", "token-loss"]).config  # needs no files
    assert config.model.num_layers or recipe.stem == "pretraining"
    if recipe.parent.name == "runs" and recipe.stem != "pretraining":
        resolve(config, world_size=config.parallel.tensor_model_parallel_size)


def test_a_switch_with_a_value_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"--swiglu.*a switch takes no value"):
        parse(["--swiglu=true"])
