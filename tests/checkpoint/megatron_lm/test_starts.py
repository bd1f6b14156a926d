"""Test runs that start from or resume checkpoints of Megatron-LM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_slm.testing.megatron_models import command
from megatron_slm.testing.tiny import Outcome, losses, run_each

DISTRIBUTED = {"use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def outcomes(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Return the outcomes of all runs of this file by name, from one process; the saves are below ``output``."""
    output = recorded / "runs"

    def run(name: str, model: str, load: str, **flags: object) -> tuple[str, list[str]]:
        source = flags.pop("source", "load")
        paths = {source: recorded / load, "save": output / name}
        return name, command(model, **paths, **flags)

    runs = dict(
        [
            run("buckets", "llama", "llama", **DISTRIBUTED),
            run("parameters", "llama", "llama-twin", **DISTRIBUTED),
            run("other optimizer", "llama", "llama"),
            run("other layout", "gpt", "gpt", **DISTRIBUTED),
            run("new optimizer", "gpt", "gpt", no_load_optim=True, train_iters=4),
            run("bf16", "bf16", "bf16", **DISTRIBUTED),
            run("no optimizer", "moe", "moe"),
            run("finetune", "moe", "moe", finetune=True, train_iters=2),
            run("pretrained", "moe", "moe/iter_0000003", source="pretrained_checkpoint", train_iters=2),
            run("larger model", "llama", "llama", hidden_size=32, untie_embeddings_and_output_weights=True),
            run("adopted", "gpt", "llama", use_checkpoint_args=True, finetune=True, train_iters=2),
            run("schedule", "llama", "llama", lr=3e-3, **DISTRIBUTED),
            run("larger vocabulary", "llama", "llama", finetune=True, vocab_size=100),
        ]
    )
    return dict(zip(runs, run_each(*runs.values()), strict=True))


def test_state_in_buckets_and_by_parameter_resume_equally(recorded: Path, outcomes: dict[str, Outcome]) -> None:
    for name in ("buckets", "parameters"):
        assert outcomes[name].code == 0, outcomes[name].errors
        assert "resuming from" in outcomes[name].output
    buckets, parameters = (losses(recorded / "runs" / name) for name in ("buckets", "parameters"))
    assert buckets == parameters and len(buckets) == 7
    first = json.loads((recorded / "runs" / "buckets" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 4 and first["lr"] == pytest.approx(0.008947199994)  # of Megatron-LM after step 3


def test_bf16_state_resumes_in_another_layout(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["bf16"].code == 0, outcomes["bf16"].errors
    assert "--pipeline-model-parallel-size 2 -> 1" in outcomes["bf16"].output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other optimizer", "has the state of a distributed optimizer in buckets. Add --no-load-optim"),
        ("other layout", "the optimizer state of the checkpoint belongs to another layout. Add --no-load-optim"),
        ("no optimizer", "has no optimizer state (it was saved with --no-save-optim). Add --no-load-optim"),
        ("larger model", "--hidden-size 32 differs from the checkpoint"),
        ("schedule", "--use-checkpoint-opt_param-scheduler"),
        ("larger vocabulary", "embedding.word_embeddings.weight has 64 rows, and the tokenizer has 100 tokens"),
    ],
)
def test_incompatible_starts_are_refused(outcomes: dict[str, Outcome], name: str, message: str) -> None:
    assert outcomes[name].code == 2
    assert message in " ".join(outcomes[name].errors.split())


@pytest.mark.parametrize("name", ["new optimizer", "finetune", "pretrained", "adopted"])
def test_weights_are_loaded(recorded: Path, outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].code == 0, outcomes[name].errors
    assert (recorded / "runs" / name / "latest_checkpointed_iteration.txt").is_file()


def test_model_settings_are_adopted(outcomes: dict[str, Outcome]) -> None:
    assert "--ffn-hidden-size 32" in " ".join(outcomes["adopted"].output.split())
