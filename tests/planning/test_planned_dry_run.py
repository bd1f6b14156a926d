"""Recipes and flags of plans, checked by the trainer's --dry-run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_slm.cli import plan_run
from megatron_slm.reference import replica
from megatron_slm.testing.tiny import captured
from megatron_slm.training import setup

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SLM = ("runs/slm-math-7b", "clusters/h100-tp2")
RUNS = {
    "SLM with a co-located reference model in FP8": (("models/mistral-7b", *SLM, "clusters/fp8"), 16, ()),
    "context parallelism": (("models/llama-3-8b", *SLM), 32, ("--seq-length", "65536", "--global-batch-size", "16")),
}


@pytest.mark.parametrize("name", RUNS)
def test_dry_run_accepts_the_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "check_reference", lambda *_, **options: None)  # there is no reference model
    monkeypatch.setattr(setup, "reference_identity", lambda *_: "rm")
    recipes, gpus, flags = RUNS[name]
    run = ["--config", *(str(RECIPES / f"{recipe}.yaml") for recipe in recipes), *flags]
    layout = tmp_path / "layout.yaml"
    outcome = captured([*run, "--gpus", str(gpus), "--json", "--output", str(layout)], plan_run.main)
    assert outcome.code == 0, outcome.errors
    files = ["--reference-load", str(tmp_path), "--tokenizer-type", "ByteTokenizer", "--mock-data"]
    files += ["--dry-run", "--world-size", str(gpus)]
    for planned in (["--config", str(layout)], json.loads(outcome.output)["flags"].split()):
        accepted = captured([*run, *planned, *files])
        assert accepted.code == 0, accepted.errors
        assert f"= {gpus} processes" in accepted.output
