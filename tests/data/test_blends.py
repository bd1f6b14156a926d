"""Blends: equivalent sources, reported dataset usage, and rejection of corpora that are too small."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.cli.pretrain import main
from megatron_slm.config.blends import resolve_blends
from megatron_slm.config.flags import parse
from megatron_slm.config.schema import DataConfig
from megatron_slm.data.blends import parse_blend
from megatron_slm.data.datasets import build_datasets, check_corpora
from megatron_slm.data.splits import estimate_training_usage
from megatron_slm.data.usage import measure_usage
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.corpus_files import Documents, build
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import MODEL, command
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles

LENGTH = 16  # tokens of a sample


def corpus_of(prefix: Path, token: int, tokens: int) -> str:
    """Write a corpus of a single token id, which identifies the corpus of a sample."""
    return build(prefix, [[[token] * 10]] * (tokens // 10))


def _build(rank: int, world_size: int, data: DataConfig, train: int, valid: int) -> dict[str, Any]:
    """Return the samples read and the usage reported by a run, or its error."""
    try:
        check_corpora(data, ByteTokenizer(TokenizerFiles()))
        sets = build_datasets(
            data,
            tokenizer=ByteTokenizer(TokenizerFiles()),
            seq_length=LENGTH,
            train_samples=train,
            valid_samples=valid,
            seed=3,
        )
    except ConfigError as error:
        return {"error": str(error)}
    counts = Counter(int(sets.train[index]["tokens"][3]) for index in range(train))
    valid_counts = {
        name: Counter(int(built[index]["tokens"][3]) for index in range(min(valid, len(built))))  # type: ignore[arg-type]
        for name, built in sets.valid.items()
    }
    return {"counts": counts, "valid": valid_counts, "drawn": [asdict(row) for row in sets.usage()]}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("weights", [True, False])
def test_reported_usage_matches_the_samples_read(tmp_path: Path, world_size: int, weights: bool) -> None:
    a, b = corpus_of(tmp_path / "a", 1, 800), corpus_of(tmp_path / "b", 2, 3200)
    data = DataConfig(
        data_path=["3", a, "1", b] if weights else [a, b],
        valid_data_path={"alone": [b], "both": ["1", a, "4", b]},
    )
    results = run_ranks(_build, world_size, data, 120, 20)
    assert all(result == results[0] for result in results)
    result = results[0]
    assert sum(result["counts"].values()) == 120
    rows = {(row["name"], row["prefix"]): row for row in result["drawn"]}
    assert set(rows) == {("train", a), ("train", b), ("both", a), ("both", b)}
    for token, prefix, tokens in ((1, a, 800), (2, b, 3200)):
        row = rows["train", prefix]
        assert row["samples"] == result["counts"][token]
        assert row["share"] == pytest.approx(result["counts"][token] / 120)
        assert row["epochs"] == pytest.approx(result["counts"][token] * LENGTH / tokens)
        assert rows["both", prefix]["samples"] == result["valid"]["both"][token]
    assert rows["train", a]["weight"] == (0.75 if weights else None)
    assert result["counts"][1] == pytest.approx(90 if weights else 24, abs=2)
    guessed = estimate_training_usage(data, train_samples=120, valid_samples=20, seq_length=LENGTH)
    for row in guessed:
        assert row.samples == pytest.approx(rows["train", row.prefix]["samples"], abs=2)
        assert row.share == pytest.approx(rows["train", row.prefix]["share"], abs=0.02)
        assert row.epochs == pytest.approx(rows["train", row.prefix]["epochs"], abs=0.3)


def test_epochs_are_relative_to_the_split(tmp_path: Path) -> None:
    data = DataConfig(data_path=[corpus_of(tmp_path / "a", 1, 1600)], split="75,25,0")
    [result] = run_ranks(_build, 1, data, 100, 4)
    assert result["drawn"][0]["epochs"] == pytest.approx(100 * LENGTH / 1200)
    [row] = estimate_training_usage(data, train_samples=100, valid_samples=4, seq_length=LENGTH)
    assert row.epochs == pytest.approx(100 * LENGTH / 1200)
    assert result["valid"] == {"valid": {1: 4}}


SMALL: list[tuple[str, Documents, dict[str, Any], str]] = [
    ("0 documents", [], {"split": "1,0,0"}, "contains no tokens"),
    ("1 empty document", [[]], {"split": "1,0,0"}, "contains no tokens"),
    ("1 of one token", [[[7]]], {"split": "1,0,0"}, ""),
    ("1 document", [[[7] * 40]], {"split": "1,0,0"}, ""),
    ("1 document split", [[[7] * 40]], {}, "--split 969, 30, 1 leaves none of 1 sequences for validation"),
    ("2 documents", [[[7] * 40], [[7]]], {"split": "1,0,0"}, ""),
    ("2 documents split", [[[7] * 40], [[7] * 9]], {"split": "1,1,0"}, ""),
    ("2 for none", [[[7] * 40], [[7]]], {"split": "0,1,0"}, "leaves none of 2 sequences for training"),
    ("60 documents", [[[7] * 40]] * 60, {}, ""),  # of which the default leaves none for the test that nobody reads
    ("0 to evaluate", [], {"valid": True}, "--valid-data-path v"),
    ("1 to evaluate", [[[7]]], {"valid": True}, ""),
    (
        "1 to evaluate whole",
        [[[7] * 9]],
        {"valid": True, "full_validation": True},
        "too few tokens for a sample of 16 tokens",
    ),
    ("too small for one epoch", [[[7] * 16]], {"beside": True}, "16 tokens are too few for one sample"),
    ("one sample in one epoch", [[[7] * 17]], {"beside": True}, ""),
]


@pytest.fixture(scope="module")
def results_of_small_corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Build the datasets of all cases in one process."""
    directory = tmp_path_factory.mktemp("small")
    large = corpus_of(directory / "large", 1, 2000)
    cases = {name: _with_small_corpus(build(directory / name, text), large, flags) for name, text, flags, _ in SMALL}
    return dict(zip(cases, run_ranks(_build_each, 1, list(cases.values()))[0], strict=True))


def _with_small_corpus(small: str, large: str, flags: dict[str, Any]) -> DataConfig:
    flags = dict(flags)
    if flags.pop("valid", False):
        return DataConfig(data_path=[large], valid_data_path={"v": [small]}, **flags)
    if flags.pop("beside", False):
        return DataConfig(data_path=[large, small], split="1,0,0", **flags)
    return DataConfig(data_path=[small], **flags)


def _build_each(rank: int, world_size: int, cases: list[DataConfig]) -> list[dict[str, Any]]:
    return [_build(rank, world_size, data, 10, 2) for data in cases]


@pytest.mark.parametrize(("name", "message"), [(case[0], case[3]) for case in SMALL], ids=[case[0] for case in SMALL])
def test_corpora_too_small_for_the_run_are_rejected(
    results_of_small_corpora: dict[str, dict[str, Any]], name: str, message: str
) -> None:
    result = results_of_small_corpora[name]
    assert message in result.get("error", "")
    assert bool(message) == ("error" in result), result


def test_run_longer_than_one_epoch_of_unweighted_corpora_is_rejected(tmp_path: Path) -> None:
    data = DataConfig(data_path=[corpus_of(tmp_path / name, 1, 400) for name in "ab"], split="1,0,0")
    [result] = run_ranks(_build, 1, data, 49, 0)
    assert "have 48 samples in one epoch, but the run requires 49" in result["error"]


WEIGHTS = st.dictionaries(
    st.text("abc/_-.é ", min_size=1, max_size=6).filter(lambda name: name.strip() == name and name.strip(".") != ""),
    st.floats(1e-6, 1e6),
    min_size=1,
    max_size=4,
).filter(lambda blend: len({os.path.normpath(prefix) for prefix in blend}) == len(blend))  # equal paths are merged


@settings(max_examples=40, deadline=None)
@given(WEIGHTS)
def test_blend_is_independent_of_its_source(tmp_path_factory: pytest.TempPathFactory, blend: dict[str, float]) -> None:
    directory = tmp_path_factory.getbasetemp()
    words = [word for prefix, weight in blend.items() for word in (str(weight), prefix)]
    (directory / "blend.json").write_text(json.dumps(blend))
    (directory / "blend.yaml").write_text("".join(f"{json.dumps(p)}: {w!r}\n" for p, w in blend.items()))
    (directory / "list.json").write_text(json.dumps(words))
    (directory / "split.json").write_text(json.dumps({"train": blend, "valid": words, "test": None}))
    expected = (list(blend), list(blend.values()))
    for name in ("blend.json", "blend.yaml", "list.json"):
        given = DataConfig(data_path=[str(directory / name)], valid_data_path={"v": [str(directory / name)]})
        data = resolve_blends(given)
        assert parse_blend(data.data_path) == parse_blend(data.valid_data_path["v"]) == expected
    data = resolve_blends(DataConfig(per_split_data_args_path=str(directory / "split.json")))
    assert parse_blend(data.train_data_path) == parse_blend(data.valid_data_path["valid"]) == expected
    assert resolve_blends(data) == data, "a second time changes nothing"


def test_argument_file_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("0.3 some/a\n0.7 some/b\n")
    data = resolve_blends(DataConfig(data_args_path=str(tmp_path / "words.txt")))
    assert data.data_path == ["0.3", "some/a", "0.7", "some/b"]
    (tmp_path / "recipe.yaml").write_text("data_path: {some/a: 0.3, some/b: 0.7}\nvalid_data_path: {v: {c: 1, d: 2}}\n")
    config = parse(["--config", str(tmp_path / "recipe.yaml")]).config
    assert parse_blend(config.data.data_path) == (["some/a", "some/b"], [0.3, 0.7])
    assert parse_blend(config.data.valid_data_path["v"]) == (["c", "d"], [1.0, 2.0])


def test_usage_of_an_empty_split() -> None:
    class Corpus:
        def samples_per_epoch(self) -> float:
            return 1 / 8

    [row] = measure_usage("train", Corpus(), (["a"], None), 0)
    assert (row.samples, row.share, row.epochs) == (0, 0.0, 0.0)


def _main(rank: int, world_size: int, argv: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(argv)
    return code, said.getvalue()


@pytest.mark.parametrize("world_size", [1, 2])
def test_run_prints_its_dataset_usage(tmp_path: Path, world_size: int) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text("".join(f"{corpus_of(tmp_path / name, 65, 4000)}: {w}\n" for name, w in (("a", 3), ("b", 1))))
    argv = command(str(blend), tmp_path / "run", dp=world_size, train_iters=2)
    argv[argv.index(f"own={blend}")] = f"own={tmp_path}/a"
    results = run_ranks(_main, world_size, argv, initialize=False)
    assert [code for code, _ in results] == [0] * world_size
    lines = [line.split() for line in results[0][1].splitlines() if line.strip().startswith("train ")]
    assert lines == [
        ["train", "75.00%", "75.00%", "24", "0.192", f"{tmp_path}/a"],
        ["train", "25.00%", "25.00%", "8", "0.064", f"{tmp_path}/b"],
    ]
    assert all("data usage:" not in output for _, output in results[1:])
    saved = next((tmp_path / "run").rglob("*.yaml")).read_text()
    assert "blend.yaml" not in saved and f"{tmp_path}/b" in saved


def test_dry_run_prints_the_estimated_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = corpus_of(tmp_path / "a", 65, 4000), corpus_of(tmp_path / "b", 65, 1000)
    argv = [*command("3", None, train_iters=2), "--dry-run"]
    argv[argv.index("--data-path") + 1 : argv.index("--data-path") + 2] = ["3", a, "1", b]
    argv[argv.index("own=3")] = f"own={a}"
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "from the corpus sizes" in out
    assert [line.split()[1:] for line in out.splitlines() if line.strip().startswith("train ")] == [
        ["75.00%", "75.00%", "24", "0.192", a],
        ["25.00%", "25.00%", "8", "0.256", b],
    ]


FILES = {
    "empty.yaml": "",
    "broken.yaml": "a: [1",
    "broken.json": "{",
    "word.yaml": "a: heavy",
    "bool.yaml": "a: true",
    "nested.yaml": "- {a: 1}",
    "twice.yaml": "a: 1\nb: 1\na: 2",
    "twice.json": '{"a": 1, "a": 2}',
    "zero.yaml": "a: 0\nb: 1",
    "binary.yaml": "\udcff",
    "empty.txt": "\n",
    "list.json": '["a"]',
    "test.json": '{"train": ["a"], "test": ["b"]}',
    "other.json": '{"train": ["a"], "validation": ["b"]}',
    "no-train.json": '{"valid": ["a"]}',
    "good.json": '{"train": ["a"]}',
}
BAD: list[tuple[list[str], str]] = [
    (["--data-path", "empty.yaml"], "--data-path {}/empty.yaml is empty"),
    (["--data-path", "missing.yaml"], "--data-path {}/missing.yaml cannot be read: No such file"),
    (["--data-path", "broken.yaml"], "broken.yaml cannot be read"),
    (["--data-path", "broken.json"], "broken.json cannot be read"),
    (["--data-path", "word.yaml"], "word.yaml, a: the weight must be a number, not 'heavy'"),
    (["--data-path", "bool.yaml"], "the weight must be a number, not True"),
    (["--data-path", "nested.yaml"], "must be a list of prefixes or weights and prefixes"),
    (["--data-path", "twice.yaml"], "a is given twice"),
    (["--data-path", "twice.json"], "a is given twice"),
    (["--data-path", "zero.yaml"], "the weight of a is 0.0, but must be above 0"),
    (["--data-path", "binary.yaml"], "binary.yaml is not a text file"),
    (["--data-path", "-1", "a", "2", "b"], "the weight of {}/a is -1.0"),
    (["--data-path", "nan", "a", "2", "b"], "the weight of {}/a is nan"),
    (["--data-path", "0.5", "a", "b"], "expected pairs of weight and prefix"),
    (["--data-path", "0.5", "a", "0.5"], "expected pairs of weight and prefix"),
    (["--data-path", "a", "0.5", "b", "0.5"], "expected pairs of weight and prefix"),
    (["--data-path", "a", "--valid-data-path", "v=missing.yaml"], "--valid-data-path v {}/missing.yaml cannot be read"),
    (["--data-path", "a", "--split", "x"], "--split x must be up to three proportions"),
    (["--data-path", "a", "--split", "0,0,0"], "--split 0,0,0 must be up to three proportions"),
    (["--data-path", "a", "--split", "1,1,1,1"], "must be up to three proportions"),
    (["--data-path", "a", "--data-args-path", "empty.txt"], "--data-args-path and --data-path were both given"),
    (["--data-args-path", "empty.txt"], "--data-args-path {}/empty.txt is empty"),
    (["--data-args-path", "missing.txt"], "--data-args-path {}/missing.txt cannot be read"),
    (["--per-split-data-args-path", "list.json"], "must contain an object with the keys train and valid"),
    (["--per-split-data-args-path", "other.json"], "must contain an object with the keys train and valid"),
    (["--per-split-data-args-path", "no-train.json"], "must contain an object with the keys train and valid"),
    (["--per-split-data-args-path", "test.json"], "the key test is not supported"),
    (["--per-split-data-args-path", "good.json", "--data-path", "a"], "and --data-path were both given"),
    (["--data-path", "a", "--full-validation", "--valid-data-path", "1", "a", "1", "b"], "the weights of --valid"),
    (["--data-path", "1", "a", "1", "b", "--full-validation"], "conflicts with the weights of --data-path"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_invalid_blends_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    for name in "ab":
        corpus_of(tmp_path / name, 65, 4000)
    words = [_placed(word, tmp_path) for word in words]
    argv = [*MODEL, "--micro-batch-size", "2", "--train-iters", "1", *words, "--dry-run"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error, error


def _placed(word: str, directory: Path) -> str:
    name, equals, rest = word.rpartition("=")
    return f"{name}{equals}{directory / rest}" if rest in FILES or rest in "ab" or "missing" in rest else word
