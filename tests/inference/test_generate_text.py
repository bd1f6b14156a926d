"""Test the command line of generate_text: streamed text, JSON lines, and refusals with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.generate_text import StreamPrinter, main
from megatron_slm.testing.tiny import Outcome, run_each

LINES = [{"prompt": "abc", "id": 3}, {"prompt": "bad cab fed", "text": "old"}, {"prompt": ""}]


def argv(load: str, *flags: Any) -> list[str]:
    return ["--load", load, *map(str, flags)]


@pytest.fixture(scope="module")
def outcomes(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run all commands of this file in one process."""
    directory: Path = tmp_path_factory.mktemp("generate")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("\n\n".join(map(json.dumps, LINES)), encoding="utf-8")
    model, greedy = checkpoints["random"], ("--greedy", "--max-new-tokens", 6)
    alone = ("--batch-size", 1, "--no-use-cache")
    long = "x" * 64
    (directory / "long.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": long}))
    commands = {
        "stream": argv(model, "--prompt", "abc", "--prompt", "bad cab fed", *greedy),
        "batch": argv(model, "--input", prompts, "--output", directory / "batch.jsonl", *greedy),
        "single": argv(model, "--input", prompts, "--output", directory / "single.jsonl", *greedy, *alone),
        "spaces": argv(model, "--prompt", "", "--prompt", "  ", "--max-new-tokens", 1),
        "seed": argv(model, "--prompt", "abc", "--max-new-tokens", 6, "--seed", 7),
        "same seed": argv(model, "--prompt", "abc", "--max-new-tokens", 6, "--seed", 7, "--top-k", 257),
        "full": argv(model, "--prompt", long[:60], "--greedy", "--ignore-eos"),
        "long": argv(model, "--input", directory / "long.jsonl"),
        "layers": argv(model, "--prompt", "a", "--tensor-model-parallel-size", 3),
        "experts": argv(model, "--prompt", "a", "--expert-model-parallel-size", 2),
        "missing": argv("/nowhere", "--prompt", "a"),
        "step": argv(model, "--prompt", "a", "--ckpt-step", 7),
        "tokenizer": argv(model, "--prompt", "a", "--eod-id", 3),
        "no directory": argv(model, "--prompt", "a", "--output", directory / "none" / "out.jsonl"),
    }
    found = run_each(*commands.values(), main=main)
    return {"directory": directory, **dict(zip(commands, found, strict=True))}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_streamed_after_their_prompts(outcomes: dict[str, Any]) -> None:
    texts = {record["prompt"]: record["text"] for record in records(outcomes["directory"] / "batch.jsonl")}
    assert outcomes["stream"] == Outcome(0, f"abc{texts['abc']}\n\nbad cab fed{texts['bad cab fed']}\n", "")
    assert texts["abc"]


def test_output_holds_the_prompts_with_their_keys_and_texts(outcomes: dict[str, Any]) -> None:
    found = records(outcomes["directory"] / "batch.jsonl")
    assert [record["prompt"] for record in found] == [line["prompt"] for line in LINES]
    assert found[0]["id"] == 3 and found[1]["text"] != "old" and found[2]["text"]
    assert found == records(outcomes["directory"] / "single.jsonl")
    assert not list(outcomes["directory"].glob("*partial*"))


def test_prompts_may_be_empty_or_spaces(outcomes: dict[str, Any]) -> None:
    assert outcomes["spaces"].code == 0 and "\n\n  " in outcomes["spaces"].output


def test_the_seed_determines_the_text(outcomes: dict[str, Any]) -> None:
    assert outcomes["seed"].output == outcomes["same seed"].output
    assert outcomes["seed"].code == 0 and outcomes["seed"].output != outcomes["stream"].output.split("\n\n")[0]


def test_text_ends_with_the_positions_of_the_model(outcomes: dict[str, Any]) -> None:
    """Each token of the byte tokenizer is at most one character, and the model has 64 positions."""
    code, output, errors = outcomes["full"]
    assert code == 0 and 60 < len(output.rstrip("\n")) <= 64
    assert "1 of 1 prompts with --max-new-tokens 128 exceed the 64 positions of the model" in errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("long", "long.jsonl:2: the prompt has 64 tokens, and the model 64 positions"),
        ("layers", "1 processes were started, which is not a multiple of --tensor-model-parallel-size 3"),
        ("experts", "1 processes were started, which is not a multiple of --tensor-model-parallel-size 1"),
        ("missing", "--load /nowhere: there is no such directory"),
        ("step", "step 7 (--ckpt-step) does not exist. Existing steps: "),
        ("tokenizer", "--load: the model was trained with ByteTokenizer of end-of-document id 256"),
        ("no directory", "none does not exist"),
    ],
)
def test_refusals(outcomes: dict[str, Any], name: str, message: str) -> None:
    code, output, errors = outcomes[name]
    assert code == 2 and message in errors and "Traceback" not in errors and not output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load", "x"], "Give the prompts with either --prompt TEXT or --input FILE."),
        (["--load", "x", "--prompt", "a", "--input", "b"], "with either --prompt TEXT or --input FILE"),
        (["--load", "x", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--load", "x", "--prompt", "a", "--micro-batch-size", "0"], "--micro-batch-size is 0"),
        (["--load", "x", "--prompt", "a\udcff"], "--prompt: 'a\\udcff' is not valid UTF-8 text"),
        (["--load", "x", "--prompt", "a", "--context-parallel-size", "2"], "parallelism divide the prompts"),
        (
            ["--load", "x", "--prompt", "a", "--pipeline-model-parallel-size", "0"],
            "--pipeline-model-parallel-size is 0",
        ),
        (["--load", "x", "--prompt", "a", "--top_k", "1"], "--top_k is not supported. Use --top-k."),
        (["--load", "x", "--prompt", "a", "--max-new-token", "1"], "unknown flag --max-new-token"),
    ],
)
def test_invalid_command_lines_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_the_first_text_is_printed_as_it_grows(capsys: pytest.CaptureFixture[str]) -> None:
    printer = StreamPrinter(["a", "b"], is_first=True)
    shown = []
    for index, new in ((0, "x"), (1, "p"), (0, "y"), (1, "q")):
        printer.add(index, new)
        shown.append(capsys.readouterr().out)
    printer.finish(["xy", "pq"])
    assert shown == ["ax", "", "y", ""] and capsys.readouterr().out == "\n\nbpq\n"
