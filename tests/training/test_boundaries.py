"""Test boundary values of every flag: refused with a message or trained, without a traceback or hang."""

from __future__ import annotations

import math
import signal
from dataclasses import Field
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.config.constraints import LARGEST_INTEGER, Bounds, flag_name
from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import settings
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import BATCH, _main, command, make_corpus

Setting = tuple[Field[Any], Any]
SETTINGS: dict[str, Setting] = {flag_name(setting): (setting, kind) for _, setting, kind in settings()}
NUMBERS = {
    flag: each
    for flag, each in SETTINGS.items()
    if ("int" in str(each[1]) or "float" in str(each[1])) and "list" not in str(each[1])
}
TEXTS = {flag: each for flag, each in SETTINGS.items() if "str" in str(each[1]) and not each[0].metadata["choices"]}
NEVER = ["", " ", "abc", "nan", "inf", "-inf", "1e400", str(2**63), str(2**64), "9" * 5000]
SECONDS = 60  # time limit of a tiny run

# Flags required by other flags to have an effect.
WITH: dict[str, list[str]] = {
    "--moe-ffn-hidden-size": ["--num-experts", "2"],
    "--moe-aux-loss-coeff": ["--num-experts", "2"],
    "--moe-z-loss-coeff": ["--num-experts", "2"],
    "--moe-router-topk": ["--num-experts", "2", "--moe-router-pre-softmax"],
    "--num-experts": ["--moe-router-topk", "1", "--moe-router-pre-softmax"],
    "--recompute-num-layers": ["--recompute-granularity", "full", "--recompute-method", "uniform"],
    "--lr-wsd-decay-iters": ["--lr-decay-style", "WSD"],
    "--start-weight-decay": ["--end-weight-decay", "1e30", "--weight-decay-incr-style", "linear"],
    "--eval-interval": ["--eval-iters", "1"],
    "--end-weight-decay": ["--start-weight-decay", "0", "--weight-decay-incr-style", "linear"],
    "--sgd-momentum": ["--optimizer", "sgd"],
    "--max-position-embeddings": ["--position-embedding-type", "learned_absolute"],
    "--slm-selection-ratio-start": ["--slm-selection-ratio-warmup-iters", "1"],
    "--slm-gumbel-temperature": ["--slm-score", "stochastic-token-loss"],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("boundaries")
    make_corpus(directory / "corpus", 1)
    (directory / "file").write_text("text")
    return directory


def argv(workspace: Path, flag: str, value: str) -> list[str]:
    """Return the command of a one-step run with a flag value and the flags it requires."""
    corpus = str(workspace / "corpus_text_document")
    arguments = command(corpus, losses_only=True, train_iters=1, num_layers=1, global_batch_size=BATCH)
    if flag.startswith("--slm-"):
        arguments += ["--objective", "slm", "--slm-score", "token-loss"]
    return [*arguments, *WITH.get(flag, []), f"{flag}={value}"]


def lowest(setting: Field[Any], kind: Any) -> str:
    """Return the lowest valid value of a setting."""
    bounds: Bounds = setting.metadata["bounds"]
    if math.isfinite(bounds.at_least):
        return f"{bounds.at_least}"
    return str(int(bounds.above) + 1) if "int" in str(kind) else "1e-30"


def highest(setting: Field[Any], kind: Any) -> str:
    """Return a value at or near the highest valid value of a setting."""
    bounds: Bounds = setting.metadata["bounds"]
    if math.isfinite(bounds.at_most):
        return f"{bounds.at_most}"
    if math.isfinite(bounds.below):
        return str(math.nextafter(bounds.below, 0))
    return str(LARGEST_INTEGER) if "int" in str(kind) else "1e300"


@pytest.mark.parametrize("flag", NUMBERS)
def test_values_outside_the_bounds_are_refused(flag: str) -> None:
    setting, kind = NUMBERS[flag]
    bounds: Bounds = setting.metadata["bounds"]
    assert math.isfinite(max(bounds.above, bounds.at_least)), f"{flag} has no lower bound"
    below = f"{bounds.above}" if math.isfinite(bounds.above) else f"{bounds.at_least - 1}"
    beyond = [below] if not math.isfinite(bounds.below) else [below, f"{bounds.below}"]
    values = NEVER if "int" in str(kind) else [value for value in NEVER if value not in (str(2**63), str(2**64))]
    for value in [*beyond, *values]:
        with pytest.raises(ConfigError, match=flag):
            parse([f"{flag}={value}"])


@pytest.mark.parametrize("flag", NUMBERS)
def test_bounds_pass_or_are_refused(workspace: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (lowest(*NUMBERS[flag]), highest(*NUMBERS[flag])):
        code = main([*argv(workspace, flag, value), "--dry-run"])
        error = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in error, f"{flag} {value}: {error}"


@pytest.mark.parametrize("flag", TEXTS)
def test_unusual_text_passes_or_is_refused(workspace: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Try missing files, directories, files of another type, invalid and long names, and markup."""
    odd = ["/nowhere/x", str(workspace / "file"), str(workspace), "a" * 300, "a/" * 3000, "[/red]", "τ\u202e\n", "0"]
    for value in odd:
        code = main([*argv(workspace, flag, value), "--dry-run"])
        error = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in error, f"{flag} {value}: {error}"
    for value in ("", " ", "\udcff\udcfe"):
        assert main([*argv(workspace, flag, value), "--dry-run"]) == 2
        assert flag in capsys.readouterr().err


def _outcomes(rank: int, world_size: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    return [_outcome(arguments) for arguments in commands]


def _outcome(arguments: list[str]) -> tuple[int, str]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"{arguments[-1]} takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return _main(0, 1, arguments)
    finally:
        signal.alarm(0)


def _start(workspace: Path, values: list[tuple[str, str]]) -> None:
    """Run the trainer once per distinct configuration: many of the lowest values are defaults."""
    commands = {_configuration(arguments): arguments for arguments in (argv(workspace, *value) for value in values)}
    outcomes = run_ranks(_outcomes, 1, list(commands.values()), initialize=False, timeout=len(commands) * SECONDS)[0]
    for arguments, (code, error) in zip(commands.values(), outcomes, strict=True):
        assert code in (0, 2, 3) and "Traceback" not in error, f"{arguments[-1]}: {error}"


def _configuration(arguments: list[str]) -> str:
    """Return a text that is equal for commands of equal settings."""
    try:
        return repr(parse(arguments).config)
    except ConfigError as error:
        return str(error)


def test_lowest_values_start(workspace: Path) -> None:
    skipped = ("--mtp-num-layers",)  # Megatron-Core's log of it keeps its size for the life of a process
    _start(workspace, [(flag, lowest(*each)) for flag, each in NUMBERS.items() if flag not in skipped])


@pytest.mark.slow
def test_highest_values_and_choices_start(workspace: Path) -> None:
    values = [(flag, highest(*each)) for flag, each in NUMBERS.items()]
    values += [(flag, choice) for flag, each in SETTINGS.items() for choice in each[0].metadata["choices"]]
    _start(workspace, values)
