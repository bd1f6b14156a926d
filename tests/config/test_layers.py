"""Layered recipes: bases, several recipes, and precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.config.flags import parse
from megatron_slm.config.layers import read_layers
from megatron_slm.config.recipe import dump_config, from_flat_dict
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError


def recipe(path: Path, **values: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return str(path)


def parsed(*arguments: str) -> RunConfig:
    return parse(["--config", *arguments]).config


def test_a_recipe_overrides_its_bases_and_later_bases_override_earlier_ones(tmp_path: Path) -> None:
    recipe(tmp_path / "models" / "small.yaml", num_layers=2, hidden_size=8, swiglu=True)
    recipe(tmp_path / "common.yaml", hidden_size=16, lr=0.1, bf16=True)
    top = recipe(tmp_path / "runs" / "run.yaml", base=["../models/small.yaml", "../common.yaml"], lr=0.2, no_bf16=True)
    config = parsed(top)
    assert (config.model.num_layers, config.model.hidden_size, config.model.swiglu) == (2, 16, True)
    assert (config.optimizer.lr, config.training.bf16) == (0.2, False)
    assert parsed(top, "--lr", "0.3").optimizer.lr == 0.3


def test_bases_have_bases(tmp_path: Path) -> None:
    recipe(tmp_path / "a.yaml", num_layers=1, hidden_size=8)
    recipe(tmp_path / "b.yaml", base="a.yaml", num_layers=2)
    assert parsed(recipe(tmp_path / "c.yaml", base="b.yaml")).model.num_layers == 2


def test_later_recipes_override_earlier_ones(tmp_path: Path) -> None:
    first, second = recipe(tmp_path / "1.yaml", num_layers=1, lr=0.1), recipe(tmp_path / "2.yaml", num_layers=2)
    for arguments in ([first, second], [first, "--config", second]):
        config = parsed(*arguments)
        assert (config.model.num_layers, config.optimizer.lr) == (2, 0.1)


def test_a_shared_base_does_not_override_a_recipe(tmp_path: Path) -> None:
    recipe(tmp_path / "model.yaml", num_layers=1)
    run = recipe(tmp_path / "run.yaml", base="model.yaml", num_layers=5)
    cluster = recipe(tmp_path / "cluster.yaml", base="model.yaml", bf16=True)
    assert parsed(run, cluster).model.num_layers == 5


def test_a_problem_names_its_file(tmp_path: Path) -> None:
    wrong = recipe(tmp_path / "model.yaml", num_layers="two")
    run = recipe(tmp_path / "run.yaml", base="model.yaml", hiden_size=8)
    with pytest.raises(ConfigError) as caught:
        parsed(run)
    assert f"{wrong}: num_layers" in str(caught.value) and f"{run}: hiden_size is unknown" in str(caught.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("run.yaml", "derives from itself"),
        ("other.yaml", r"derives from itself: .*run.yaml -> .*other.yaml -> .*run.yaml"),
        ("missing.yaml", r"missing.yaml: the recipe cannot be read"),
        (".", "cannot be read: Is a directory"),
        ("", "base is empty"),
        ([""], "base is empty"),
        ([["a"]], "base must be a string"),
        ({"a": 1}, "base must be a string"),
    ],
)
def test_unusable_bases_are_refused(tmp_path: Path, base: Any, message: str) -> None:
    recipe(tmp_path / "other.yaml", base="run.yaml")
    with pytest.raises(ConfigError, match=message):
        read_layers([Path(recipe(tmp_path / "run.yaml", base=base))])


def test_set_overrides_recipes_and_flags_override_it(tmp_path: Path) -> None:
    first = recipe(tmp_path / "1.yaml", lr=0.1, num_layers=1, bf16=True)
    config = parsed(first, "--set", "lr=2e-1", "no-bf16=true", "--set=--num_layers=3", "--set", "lr=0.3")
    assert (config.optimizer.lr, config.training.bf16, config.model.num_layers) == (0.3, False, 3)
    assert parsed(first, "--set", "lr=0.2", "--lr", "0.5").optimizer.lr == 0.5
    assert parse(["--num-layers", "5", "--set", "num_layers=4", "--config", first]).config.model.num_layers == 5


def test_set_reads_values_as_yaml() -> None:
    given = ["data_path=[0.3, a, 0.7, b]", "valid-data-path={math: c=d}", "slm_score=excess:0.5 and random:0.5"]
    config = parse(["--set", *given, "save=~/ü b", "train_samples=null", "wandb_exp_name='yes'", "swiglu=yes"]).config
    assert config.data.data_path == ["0.3", "a", "0.7", "b"] and config.data.valid_data_path == {"math": ["c=d"]}
    assert config.objective.slm_score == "excess:0.5 and random:0.5" and config.training.train_samples is None
    assert config.checkpoint.save == str(Path.home() / "ü b") and config.logging.wandb_exp_name == "yes"
    assert from_flat_dict(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("globl-batch_size=8", "--set globl_batch_size is unknown. Did you mean global_batch_size?"),
        ("num_layers=two", "--set num_layers must be an integer, not 'two'."),
        ("lr=-1", "--lr is -1.0, and must be in [0, 1e+06]."),
        ("lr", "--set lr: a setting is written as NAME=VALUE"),
        ("lr=", "--set lr=: a setting is written as NAME=VALUE"),
        ("=1", "--set =1: a setting is written as NAME=VALUE"),
        ("save=''", "--set save is empty."),
        ("data_path=[a", "--set data_path: '[a' is not valid YAML"),
        ("data_path={a: 1, a: 2}", "--set data_path: '{a: 1, a: 2}' is not valid YAML"),
        ("base=x.yaml", "--set base is unknown."),
        ("optimizer-cpu-offload=true", "--set optimizer_cpu_offload is a Megatron-LM flag that is not supported"),
        ("save=\udce9", "--set: 'save=\\udce9' is not valid UTF-8 text"),
    ],
)
def test_a_wrong_assignment_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--set", text])
    assert message in str(caught.value)
