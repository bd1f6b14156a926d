"""--use-checkpoint-args adopts the model settings of the checkpoint only."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_slm.checkpoint.adoption import adopt_settings
from megatron_slm.config.checkpoint_files import Manifest, file_sizes
from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import dump_config
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.errors import ConfigError

SAVED = ["--num-layers", "6", "--hidden-size", "48", "--seq-length", "128", "--position-embedding-type", "rope"]
SAVED += ["--rotary-base", "500000", "--swiglu", "--tokenizer-type", "NullTokenizer", "--vocab-size", "99"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run" / "iter_0000004"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(parse([*SAVED, "--lr", "0.5", "--seed", "5"]).config))
    Manifest(4, 64, {}, {}, file_sizes(directory)).write(directory, text_checksum)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path / "run"


def adopt(*argv: str) -> tuple[RunConfig, str]:
    command = parse([*argv, "--use-checkpoint-args"], adopt_settings)
    return command.config, command.note


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_model_and_tokenizer_come_from_the_checkpoint(run: Path, flag: str) -> None:
    config, note = adopt(flag, str(run), "--num-layers", "2", "--lr", "0.1", "--seed", "1")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.seq_length, model.rotary_base) == (6, 48, 128, 500000)
    assert model.swiglu and model.vocab_size == 99 and config.tokenizer.tokenizer_type == "NullTokenizer"
    assert config.optimizer.lr == 0.1 and config.training.seed == 1
    assert f"from {run / 'iter_0000004'}" in note and "--num-layers 6" in note and "\n" not in note


def test_given_tokenizer_is_kept(run: Path) -> None:
    config, _ = adopt("--load", str(run), "--tokenizer-type", "ByteTokenizer")
    assert config.tokenizer.tokenizer_type == "ByteTokenizer" and config.model.vocab_size is None


def test_first_start_of_a_run_uses_the_flags(run: Path, tmp_path: Path) -> None:
    config, note = adopt("--load", str(tmp_path / "new"), "--num-layers", "2")
    assert config.model.num_layers == 2 and "no checkpoint yet" in note
    (tmp_path / "new").mkdir()
    config, _ = adopt("--load", str(tmp_path / "new"), "--pretrained-checkpoint", str(run), "--num-layers", "2")
    assert config.model.num_layers == 6


def test_checkpoint_without_configuration_is_refused(run: Path) -> None:
    (run / "iter_0000004" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        adopt("--load", str(run))
