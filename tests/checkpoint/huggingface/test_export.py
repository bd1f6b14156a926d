"""Exported models: names that other loaders expect, settings that no family represents, files and tokenizers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.checkpoint.huggingface.export_model import choose_family
from megatron_slm.checkpoint.huggingface.registry import FAMILIES
from megatron_slm.checkpoint.source import find_source
from megatron_slm.cli.convert_checkpoint import main
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.published import VARIANTS, Published

NAMES = json.loads((Path(__file__).parents[2] / "fixtures" / "published_names.json").read_text())
UNTIED = {"qwen3": {"untie_embeddings_and_output_weights": True}}  # the variant of the tests is tied


def _config(published: dict[str, Published], name: str) -> RunConfig:
    return find_source(str(published[name].directory), None, "--load").config()


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_other_loaders(published: dict[str, Published], family: str) -> None:
    model = with_settings(_config(published, family), UNTIED.get(family, {})).model
    names = {name for weight in FAMILIES[family].weights(model) for name in weight.names}
    assert names == set(NAMES["vllm"]["names"][family])
    assert {name.rpartition(".")[0] for name in names} <= set(NAMES["llama.cpp"]["names"])


def test_documentation_lists_the_supported_families() -> None:
    root = Path(__file__).parents[3]
    lines = (root / "docs" / "checkpoints.md").read_text().splitlines()
    listed = [match[1] for line in lines if (match := re.match(r"\| `([a-z0-9_]+)` \|", line))]
    assert listed == list(FAMILIES)
    readme = (root / "README.md").read_text().lower().replace("-", "")
    assert all(family.replace("_", "") in readme for family in FAMILIES)


@pytest.mark.parametrize("name", VARIANTS)
def test_family_follows_from_the_settings(published: dict[str, Published], name: str) -> None:
    family = choose_family(_config(published, name), None).model_type
    assert family == {"mistral": "llama"}.get(VARIANTS[name][0], VARIANTS[name][0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"slm_logit_softcap": 30.0}, "--slm-logit-softcap 30.0 (not unset)"),
        ({"apply_layernorm_1p": True}, "--apply-layernorm-1p on (not off)"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ({"swiglu": False, "activation": "squared_relu"}, "squared_relu"),
    ],
    ids=str,
)
def test_settings_that_no_family_represents(
    published: dict[str, Published], changes: dict[str, Any], expected: str
) -> None:
    config = with_settings(_config(published, "llama"), changes)
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        choose_family(config, None)
    assert "The closest is llama" in str(error.value)


def test_directories_and_sizes_are_checked(
    published: dict[str, Published], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = str(published["mistral"].directory), tmp_path / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for arguments, expected in (
        (["import", "--hf-path", model, "--save", tmp_path / "full"], "exists and is not empty"),
        (["import", "--hf-path", tmp_path / "full", "--save", run], "contains no config.json"),
        (["export", "--load", tmp_path / "none", "--hf-path", run], "there is no such directory"),
        (["export", "--load", model, "--hf-path", run, "--max-shard-size", "big"], "is not a size"),
        (["export", "--load", run], "--hf-path"),
        (["convert"], "invalid choice"),
    ):
        assert main(list(map(str, arguments))) == 2
        assert expected in capsys.readouterr().err
    assert not run.exists()
    assert main(["import", "--hf-path", model, "--save", str(run)]) == 0
    assert main(["export", "--load", str(run), "--hf-path", str(tmp_path / "full")]) == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_existing_empty_directories_and_dangling_links_are_filled(
    published: dict[str, Published], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["import", "--hf-path", str(published["llama"].directory), "--save", str(tmp_path / "run")]) == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "empty")
    for place, directory in ((".", tmp_path / "empty"), ("../link", tmp_path / "target")):
        assert main(["export", "--load", "../run", "--hf-path", place]) == 0
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in directory.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "empty", "link", "target"}


def test_imported_models_can_be_moved(published: dict[str, Published], tmp_path: Path) -> None:
    """The tokenizer and the fields of config.json that are no settings are kept beside the checkpoint."""
    model = Path(shutil.copytree(published["mistral"].directory, tmp_path / "model"))
    values = {**json.loads((model / "config.json").read_text()), "pad_token_id": 1, "custom": "kept"}
    (model / "config.json").write_text(json.dumps(values))
    assert main(["import", "--hf-path", str(model), "--save", str(tmp_path / "run")]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    source = find_source(str(tmp_path / "moved"), None, "--load")
    assert source.tokenizer().eod == 0
    assert main(["export", "--load", str(tmp_path / "moved"), "--hf-path", str(tmp_path / "out")]) == 0
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["model_type"] == "mistral" and exported["pad_token_id"] == 1 and exported["custom"] == "kept"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
