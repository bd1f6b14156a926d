"""Old spellings of flags and values, from the command line, recipes and saved configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import read_config
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError

OLD = {"slm_threshold": "carried", "slm_mtp_selection": "own", "slm_kept_logits_mb": 5}


def spellings(config: RunConfig) -> tuple[str, str, int]:
    objective = config.objective
    return objective.slm_threshold, objective.slm_mtp_selection, objective.slm_saved_logits_mb


@pytest.mark.parametrize("source", ["flags", "recipe"])
def test_old_spellings_are_accepted_with_a_note(source: str, tmp_path: Path) -> None:
    argv = [argument for name, value in OLD.items() for argument in (f"--{name.replace('_', '-')}", str(value))]
    if source == "recipe":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("".join(f"{name.replace('_', '-')}: {value}\n" for name, value in OLD.items()))
        argv = ["--config", str(recipe)]
    command = parse(argv)
    assert spellings(command.config) == ("predicted", "independent", 5)
    assert [line.partition(";")[0] for line in command.note.splitlines()] == [
        "--slm-threshold carried is now --slm-threshold predicted",
        "--slm-mtp-selection own is now --slm-mtp-selection independent",
        "--slm-kept-logits-mb is now --slm-saved-logits-mb",
    ]


def test_new_spellings_have_no_note() -> None:
    command = parse(["--slm-threshold", "predicted", "--slm-saved-logits-mb", "5"])
    assert spellings(command.config) == ("predicted", "main", 5) and not command.note


def test_a_flag_overrides_the_old_spelling_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("slm_kept_logits_mb: 5\nslm_threshold: carried\n")
    command = parse(["--config", str(recipe), "--slm-saved-logits-mb", "6", "--slm-threshold", "exact"])
    assert spellings(command.config) == ("exact", "main", 6)


def test_saved_configurations_of_earlier_versions(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in OLD.items()))
    assert spellings(read_config(path)) == ("predicted", "independent", 5)


def test_old_values_of_one_setting_are_invalid_for_others() -> None:
    with pytest.raises(ConfigError, match="--slm-scope must be one of"):
        parse(["--slm-scope", "carried"])
