"""Test data order on resume: changed batches and lengths, repeated text, changed corpora; runs counted in samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.config.checks import resolve
from megatron_slm.config.flags import parse
from megatron_slm.config.recipe import with_settings
from megatron_slm.config.schema import DataConfig, RunConfig
from megatron_slm.data.datasets import training_samples
from megatron_slm.testing.corpus_files import build
from megatron_slm.testing.numbered import write_numbered_corpus
from megatron_slm.testing.tiny import command, losses, records, run_each
from megatron_slm.tokenizers.plain_tokenizers import NullTokenizer
from megatron_slm.tokenizers.tokenizer import TokenizerFiles
from megatron_slm.training.run_length import RunLength, ScheduleLength

NUMBERS = NullTokenizer(TokenizerFiles(vocab_size=5000))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = [[[(7 * document + place) % 251 for place in range(40)]] for document in range(60)]
    return build(tmp_path_factory.mktemp("order") / "corpus", text)


def resumed(corpus: str, save: Path, *, override: bool = False, **flags: Any) -> list[str]:
    """Return the command of a run that resumes itself; ``override`` permits another schedule length."""
    argv = command(corpus, save, load=save, eval_iters=0, num_layers=1, **flags)
    return [*argv, "--override-opt_param-scheduler"] if override else argv


def batch_of(argv: list[str], batch: int) -> list[str]:
    return [*argv, "--global-batch-size", str(batch)]


def test_run_resumes_with_another_batch_size(tmp_path: Path, corpus: str) -> None:
    """The schedule ends at the last step."""
    flags = {"train_iters": 6, "lr_decay_style": "linear", "lr_warmup_iters": 2}
    first = resumed(corpus, tmp_path / "run", **flags)
    results = run_each(
        [*first, "--exit-interval", "4"],
        batch_of([*first, "--exit-interval", "5"], 8),
        batch_of([*first, "--exit-interval", "100"], 32),
    )
    assert [code for code, _, _ in results] == [0, 0, 0], results
    steps = records(tmp_path / "run")
    assert [step["tokens"] // 32 for step in steps] == [16, 32, 48, 64, 72, 104]
    rates = [step["lr"] for step in steps]
    assert rates[0] < rates[1] < rates[2] > rates[3]
    assert rates[4:] == pytest.approx([1e-2 * (80 - 64) / (80 - 32), 1e-2 * (104 - 72) / (104 - 32)])


def test_repeated_tokens_are_counted(tmp_path: Path, corpus: str) -> None:
    """The run reads 64 of 74 samples of the first epoch; a longer run shuffles two epochs together."""
    first = resumed(corpus, tmp_path / "run", train_iters=4)
    longer = resumed(corpus, tmp_path / "run", train_iters=8, exit_interval=5, override=True)
    stable = [resumed(corpus, tmp_path / "stable", train_iters=n, data_order="stable", override=True) for n in (4, 6)]
    seeded = [*stable[1], "--seed", "5", "--train-iters", "7"]
    results = run_each(first, longer, longer, *stable, seeded)
    assert [code for code, _, _ in results] == [0] * 6, results
    reports = [[line for line in out.splitlines() if "were read before" in line] for _, out, _ in results]
    assert [len(lines) for lines in reports] == [0, 1, 0, 0, 0, 1]
    [line] = reports[1]
    tokens, seen = (int(word.replace(",", "")) for word in line.split("of the next ")[1].split()[:3:2])
    assert tokens == 64 * 32 and 0.3 * tokens < seen < tokens
    assert "--data-order stable" in line


def _reported(output: str) -> tuple[int, int]:
    """Return the token count of the report, and the number of tokens read before."""
    [line] = [line for line in output.splitlines() if "were read before" in line]
    tokens, seen = (int(word.replace(",", "")) for word in line.split("of the next ")[1].split()[:3:2])
    return tokens, seen


def _labels(corpus: str, samples: int, seed: int, first: int, stop: int) -> list[int]:
    """Return the labels of samples [first, stop) in Megatron-LM's order; all ids of the corpus differ."""
    data = DataConfig(data_path=[corpus], split="1,0,0")
    train: Any = training_samples(data, tokenizer=NUMBERS, seq_length=32, samples=samples, seed=seed)
    return [label for index in range(first, stop) for label in train[index]["labels"].tolist()]


def test_tokens_read_in_all_earlier_orders_are_counted(tmp_path: Path) -> None:
    """The run is extended, changes its seed, is extended again, and its corpus moves."""
    corpus = write_numbered_corpus(tmp_path / "numbers", [[40]] * 60)
    save = tmp_path / "run"
    numbers = {"tokenizer_type": "NullTokenizer", "vocab_size": 5000, "override": True}

    def part(stop: int, train_iters: int, seed: int, corpus: str = corpus) -> list[str]:
        return resumed(corpus, save, train_iters=train_iters, exit_interval=stop, seed=seed, **numbers)

    results = run_each(part(4, 4, 1), part(5, 8, 1), part(6, 8, 2), part(7, 20, 2))
    assert [code for code, _, _ in results] == [0] * 4, results
    orders = [(64, 1), (128, 1), (128, 2), (320, 2)]  # samples of the order, seed
    bounds = [0, 64, 80, 96, 112]
    read = set()
    for number, (order, begin, end) in enumerate(zip(orders, bounds, bounds[1:], strict=False)):
        if number:
            following = _labels(corpus, *order, begin, min(order[0], begin + 2400 // 32))
            expected = sum(label in read for label in following)
            assert _reported(results[number][1]) == (len(following), expected) and expected
        read |= set(_labels(corpus, *order, begin, end))

    (tmp_path / "moved").mkdir()
    moved = str(tmp_path / "moved" / "numbers")
    for suffix in (".bin", ".idx"):
        shutil.move(corpus + suffix, moved + suffix)
    record = save / "iter_0000007" / "data.json"
    content = json.loads(record.read_text())
    assert [order["first"] for order in content["orders"]] == bounds[:-1]
    accepted = [*part(9, 20, 3, moved), "--no-slm-verify-checksums"]
    [(code, output, errors)] = run_each(accepted)
    following = _labels(moved, 320, 3, 112, 187)
    assert code == 0, errors
    assert _reported(output) == (len(following), sum(label in read for label in following))


def test_checkpoints_without_recorded_orders_are_resumed(tmp_path: Path, corpus: str) -> None:
    """They record only corpora and milestones, so all samples count as read in the configured order."""
    assert run_each(resumed(corpus, tmp_path / "run", train_iters=4))[0][0] == 0
    record = tmp_path / "run" / "iter_0000004" / "data.json"
    content = json.loads(record.read_text())
    outputs = []
    for orders in (content.pop("orders"), None):
        record.write_text(json.dumps(content | ({"orders": orders} if orders else {})).ljust(record.stat().st_size))
        shutil.copytree(tmp_path / "run", tmp_path / f"copy{len(outputs)}")
        longer = resumed(corpus, tmp_path / f"copy{len(outputs)}", train_iters=8, exit_interval=5, override=True)
        [(code, output, errors)] = run_each([*longer, "--no-slm-verify-checksums"])
        assert code == 0, errors
        outputs.append(_reported(output))
    assert outputs[0] == outputs[1]


def test_samples_of_changed_corpora_are_reported_as_not_counted(tmp_path: Path) -> None:
    prefix = build(tmp_path / "corpus", [[[1, 2, 3, 4] * 10]] * 60)
    run = tmp_path / "run"
    assert run_each(resumed(prefix, run, train_iters=2))[0][0] == 0
    build(tmp_path / "corpus", [[[4, 3, 2, 1] * 10]] * 60)
    flags = {"override": True, "slm_accept_changed_corpora": True}
    accepted, seeded = run_each(
        resumed(prefix, run, train_iters=4, exit_interval=3, **flags),
        resumed(prefix, run, train_iters=4, seed=7, **flags),
    )
    assert accepted[0] == seeded[0] == 0, (accepted, seeded)
    for output in (accepted[1], seeded[1]):
        assert f"32 earlier samples are not counted as read before: the content of the corpus {prefix} has" in output
    assert _reported(accepted[1])[1] == 0 < _reported(seeded[1])[1]


def test_changed_corpus_is_refused(tmp_path: Path) -> None:
    prefix = build(tmp_path / "corpus", [[[1, 2, 3, 4] * 10]] * 60)
    assert run_each(resumed(prefix, tmp_path / "run", train_iters=2))[0][0] == 0
    build(tmp_path / "corpus", [[[4, 3, 2, 1] * 10]] * 60)
    again = resumed(prefix, tmp_path / "run", train_iters=4, override=True)
    spelled = resumed(f"{tmp_path}/run/../{Path(prefix).name}", tmp_path / "run", train_iters=4, override=True)
    refused, respelled, accepted = run_each(again, spelled, [*again, "--slm-accept-changed-corpora"])
    assert respelled[0] == 2 and "changed since the checkpoint" in respelled[2]
    assert refused[0] == 2 and f"{prefix} changed since the checkpoint" in refused[2]
    assert "--slm-accept-changed-corpora" in refused[2]
    assert accepted[0] == 0 and "may be read again" in accepted[1], accepted


def test_run_in_samples_equals_run_in_iterations(tmp_path: Path, corpus: str) -> None:
    iterations = resumed(corpus, tmp_path / "iters", train_iters=4, lr_warmup_iters=1, lr_decay_iters=3)
    samples = resumed(corpus, tmp_path / "samples", train_samples=70, lr_warmup_samples=16, lr_decay_samples=48)
    smaller = batch_of([*samples, "--train-samples", "90"], 8)
    results = run_each(iterations, samples, [*smaller, "--override-opt_param-scheduler"])
    assert [code for code, _, _ in results] == [0, 0, 0], results
    steps = losses(tmp_path / "samples")
    assert steps[:4] == losses(tmp_path / "iters")
    assert [record["tokens"] // 32 for record in records(tmp_path / "samples")] == [16, 32, 48, 64, 72, 80, 88]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-samples", "64", "--train-iters", "3"], "--train-iters and --train-samples were both given"),
        (["--train-samples", "8"], "--train-samples 8 is less than --global-batch-size 16"),
        (["--train-samples", "64", "--lr-warmup-iters", "1"], "With --train-samples, give --lr-warmup-samples"),
        (["--train-iters", "4", "--lr-decay-samples", "9"], "With --train-iters, give --lr-decay-iters"),
        (["--train-samples", "64", "--lr-warmup-samples", "64"], "is not below the 64 samples of the schedule"),
        (["--train-samples", "64", "--lr-decay-style", "WSD"], "needs --lr-wsd-decay-samples"),
        (["--mock-data", "--train-iters", "1"], "--mock-data and --data-path were both given"),
    ],
)
def test_contradicting_lengths_are_refused(
    corpus: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([*command(corpus), *flags, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_run_length_with_changed_batch_size() -> None:
    schedule = {"lr_warmup_iters": 10, "lr_decay_iters": 90, "lr_wsd_decay_iters": 20}
    config = with_settings(RunConfig(), {"train_iters": 100, "global_batch_size": 4, **schedule})
    length = RunLength.from_config(config, [(0, 0), (80, 640)])
    assert (length.samples, length.samples_at(10), length.samples_at(90)) == (720, 80, 680)
    assert ScheduleLength.from_config(config, length) == ScheduleLength(80, 680, 680 - 560, 720)
    again = RunLength.from_config(config, [(0, 0), (80, 640), (90, 700)])
    assert [again.samples_at(step) for step in (0, 10, 80, 85, 90, 100)] == [0, 80, 640, 670, 700, 740]
    assert ScheduleLength.from_config(config, RunLength.from_config(config)) == ScheduleLength(40, 360, 80, 400)


def test_iterations_are_derived_from_samples(corpus: str, tmp_path: Path) -> None:
    for options in ([], ["--skip-train", "--load", str(tmp_path)]):
        config = resolve(parse([*command(corpus), "--train-samples", "70", *options]).config, 1)
        assert config.training.train_iters == 4
