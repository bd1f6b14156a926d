"""Test the export of checkpoints of Megatron-LM as published models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_slm.checkpoint.huggingface.import_model import import_model
from megatron_slm.checkpoint.requests import EMBEDDINGS
from megatron_slm.checkpoint.source import find_source
from megatron_slm.checkpoint.tensor_store import TensorStore
from megatron_slm.cli.convert_checkpoint import main


@pytest.mark.parametrize("name", ["llama", "gpt", "moe", "bf16"])
def test_exported_models_have_the_weights(recorded: Path, tmp_path: Path, name: str) -> None:
    published = tmp_path / "published"
    assert main(["export", "--load", str(recorded / name), "--hf-path", str(published)]) == 0
    imported = TensorStore(import_model(str(published), str(tmp_path / "imported")), "--load")
    saved = TensorStore(find_source(str(recorded / name), None, "--load").directory, "--load")
    assert imported.keys() <= saved.keys()
    for key in sorted(imported.keys()):
        rows = 60 if key in (EMBEDDINGS, "output_layer.weight") else None
        assert torch.equal(imported.read(key, ())[:rows], saved.read(key, ())[:rows]), key


def test_models_that_cannot_be_exported(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = tmp_path / "published"
    assert main(["export", "--load", str(recorded / "llama"), "--hf-path", str(published)]) == 0
    assert main(["export", "--load", str(published), "--hf-path", str(tmp_path / "again")]) == 2
    assert "is a published model already" in " ".join(capsys.readouterr().err.split())
    copied = Path(shutil.copytree(recorded / "llama", tmp_path / "llama"))
    next(copied.rglob("__0_0.distcp")).unlink()
    assert main(["export", "--load", str(copied), "--hf-path", str(tmp_path / "again")]) == 2
    assert "is damaged: __0_0.distcp is missing" in " ".join(capsys.readouterr().err.split())
