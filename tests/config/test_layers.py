"""Layered recipes: bases, several recipes, and precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.config.flags import parse
from megatron_slm.config.layers import read_layers
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
