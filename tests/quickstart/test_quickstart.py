"""Test the quickstart: corpora without leakage, reused stages, plots and findings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples" / "quickstart"))

import compare
import corpora
import stages
import studies
import study_corpora

from megatron_slm.analysis.curves import Curve, plot_comparison, plot_stages, plot_trade_off, write_curves
from megatron_slm.analysis.summary import comparison_table, speedup, tokens_to_reach
from megatron_slm.config.paths import STOP_FILE


def small_corpora(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Build corpora from a few packages instead of all."""
    import mpmath

    source = sorted(Path(mpmath.__file__).parent.rglob("*.py"))
    monkeypatch.setattr(corpora, "_source_files", lambda folders: iter(source))
    monkeypatch.setattr(corpora, "_crawled_files", lambda: iter(sorted(Path(json.__file__).parent.rglob("*.py"))))
    monkeypatch.setattr(corpora, "RAW_VALID_DOCUMENTS", 1)
    corpora.build_corpora(directory)
    return {
        path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in directory.glob("*.jsonl")
    }


def test_corpora_are_disjoint_and_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = small_corpora(tmp_path / "one", monkeypatch)
    assert texts == small_corpora(tmp_path / "two", monkeypatch)
    assert all(texts[name] for name in stages.CORPORA)
    held_out = set(texts["clean_valid"]) | set(texts["raw_valid"])
    assert not held_out & (set(texts["clean_train"]) | set(texts["raw_train"]))
    mixed = set(texts["clean_train"]) & set(texts["raw_train"])
    assert len(mixed) == len(texts["clean_train"]) // 2


def test_crawl_excludes_the_clean_packages() -> None:
    names = {part for path in corpora._crawled_files() for part in path.parts}
    assert {"torch", "asyncio"} <= names and not names & set(corpora.CLEAN_PACKAGES)


def test_stage_runs_once_for_the_same_settings(tmp_path: Path) -> None:
    done: list[str] = []
    for settings in (["a"], ["a"], ["b"]):
        stages.stage("work", tmp_path, settings, lambda settings=settings: done.append(settings[0]))  # type: ignore[misc]
    assert done == ["a", "b"]


def test_stage_is_complete_for_another_path_of_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for path in ("/old/python", "/new/python"):
        monkeypatch.setattr(sys, "executable", path)
        stages.stage("work", tmp_path, [path, "tool.py"], lambda path=path: done.append(path))  # type: ignore[misc]
    assert done == ["/old/python"]


def test_changed_inputs_repeat_a_stage(tmp_path: Path) -> None:
    """A run is repeated if the reference model, of which its command has the path only, is trained again."""
    done: list[str] = []

    def train(steps: str) -> None:
        for name, settings, inputs in (("rm", [steps], []), ("slm", ["rm"], [stages.mark("rm", tmp_path)])):
            stages.stage(name, tmp_path, settings, lambda name=name: done.append(name), inputs)  # type: ignore[misc]

    for steps in ("40", "40", "80"):
        train(steps)
    assert done == ["rm", "slm", "rm", "slm"]


def test_changed_texts_repeat_every_stage_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, ran = stages.stage, []
    variants = {**studies.STUDIES["document"].variants, **studies.STUDIES["general"].variants}

    def train(texts: str) -> list[str]:
        def stage(name: str, directory: Path, settings: Sequence[str], work: Any, inputs: Sequence[Path] = ()) -> None:
            original(name, directory, [texts] if name == "corpora" else settings, lambda: ran.append(name), inputs)

        ran.clear()
        monkeypatch.setattr(stages, "stage", stage)
        compare.train_all(tmp_path, variants, [1], 1)
        return list(ran)

    stages_of_study = train("some")
    assert len(stages_of_study) == len(set(stages_of_study)) > 20
    assert train("some") == []
    assert train("other") == stages_of_study


def test_failed_run_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "for line in range(50): print('line', line)\nexit(2)"
    with pytest.raises(stages.StageFailed):
        stages.run_with_log([sys.executable, "-c", script], tmp_path / "run.log")
    shown = capsys.readouterr().err
    assert f"exit code 2; the log {tmp_path / 'run.log'} ends with:\nline 40\n" in shown and "line 49" in shown


def test_failed_stage_is_not_marked_and_returns_its_exit_code(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(stages.StageFailed) as failure:
            stages.stage("work", tmp_path, ["a"], lambda: stages.run([sys.executable, "-c", "exit(7)"]))
        assert failure.value.code == 7


def test_stopped_run_is_not_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer saves after a signal, and exits with code 0."""
    done: list[str] = []

    def work() -> None:
        done.append("run")
        (tmp_path / STOP_FILE).unlink(missing_ok=True)
        if len(done) == 1:
            (tmp_path / STOP_FILE).write_text("SIGINT\n")

    codes = [stages.run_example(tmp_path, lambda: stages.stage("train", tmp_path, ["a"], work)) for _ in range(3)]
    assert codes == [130, 0, 0] and done == ["run", "run"]
    assert "train: stopped before its end (SIGINT)" in capsys.readouterr().err


def test_interrupted_repetition_leaves_no_mark(tmp_path: Path) -> None:
    """The former settings are not complete again."""
    done: list[str] = []
    stages.stage("work", tmp_path, ["a"], lambda: done.append("a"))
    with pytest.raises(KeyboardInterrupt):
        stages.stage("work", tmp_path, ["b"], _interrupt)
    stages.stage("work", tmp_path, ["a"], lambda: done.append("a"))
    assert done == ["a", "a"]
    assert stages.run_example(tmp_path, _interrupt) == 130


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command, calls = [sys.executable, "-c", hold, str(tmp_path / ".lock")], []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert stages.run_example(tmp_path, lambda: calls.append("during")) == 2
        other.communicate(b"\n")
    assert "another process is writing there" in capsys.readouterr().err
    assert stages.run_example(tmp_path, lambda: calls.append("after")) == 0
    assert calls == ["after"]


def curves() -> list[Curve]:
    tokens = [0, 100, 200]
    return [
        Curve(objective, seed, held_out, tokens, [5.0, 4.0 - gain / 2 + seed / 10, 3.0 - gain + seed / 10])
        for objective, gain in (("CLM", 0.0), ("SLM", 1.0))
        for seed in (0, 1)
        for held_out in ("clean", "raw")
    ]


def test_findings_and_plots(tmp_path: Path) -> None:
    table = comparison_table(curves(), "CLM").splitlines()
    assert table[0].startswith("| variant | clean held-out loss | less CLM's | raw held-out loss |")
    assert table[2].startswith("| CLM | 3.0500 ± 0.0707 |  | 3.0500 ± 0.0707 |  |")
    assert table[3].startswith("| SLM | 2.0500 ± 0.0707 | -1.0000 ± 0.0000 |")
    one_seed = comparison_table([curve for curve in curves() if curve.seed == 1], "CLM").splitlines()
    assert one_seed[3].startswith("| SLM | 2.1000 | -1.0000 |")
    assert tokens_to_reach([0, 100, 200], [5.0, 4.0, 2.0], 3.0) == 150
    assert tokens_to_reach([0, 100], [5.0, 4.0], 3.0) == math.inf
    assert "SLM reaches CLM's final clean loss (3.0500) after 133 of 200 tokens" in speedup(curves(), "SLM", "CLM")
    raw = (
        "Its raw held-out loss ends -1.0000 nats from CLM's; the gap is largest at 0 tokens (+0.0000). It never rises."
    )
    assert speedup(curves(), "SLM", "CLM").endswith(raw)
    assert "does not reach" in speedup(curves(), "CLM", "SLM")
    plot_comparison(curves(), tmp_path / "objectives.png")
    plot_stages([("base", curves()[:2], []), ("θ", curves()[2:4], [(1, 2.0, 3.0)])], tmp_path / "stages.png")
    plot_trade_off(curves(), "CLM", tmp_path / "trade-off.png")
    for name in ("objectives.png", "stages.png", "trade-off.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    write_curves(curves(), tmp_path / "curves.json")
    assert [Curve(**curve) for curve in json.loads((tmp_path / "curves.json").read_text())] == [
        replace(curve, losses=[round(loss, 6) for loss in curve.losses]) for curve in curves()
    ]


def test_studies_share_variants_and_have_their_baseline() -> None:
    variants: dict[str, studies.Variant] = {}
    for study in studies.STUDIES.values():
        assert study.baseline in study.variants
        for name, variant in study.variants.items():
            assert variants.setdefault(name, variant) == variant
            assert variant.reference in {None, *studies.REFERENCES}
            arguments = stages.blend_arguments(Path("runs"), variant.blend)
            known = (*stages.CORPORA, *study_corpora.DOMAINS, studies.SELECTED)
            prefixes = {stages.corpus(Path("runs"), corpus) for corpus in known}
            assert arguments[-1] in prefixes and (len(arguments) == 1 or set(arguments[1::2]) <= prefixes)
    assert len(variants) == len({compare.run_directory(Path(), name, 1) for name in variants})
    assert stages.blend_arguments(Path("r"), ["6", "a", "1", "b"])[::2] == ["6", "1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ratios"], "unknown study ratios"),
        (["ratio", "--seeds", "0"], "must be at least 1"),
        (["--parallel", "0"], "must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_runs_have_a_log_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that ends in a ratio has no suffix to replace."""
    logs: list[Path] = []
    monkeypatch.setattr(stages, "run_with_log", lambda command, log: logs.append(log))
    variants = {name: studies.STUDIES["ratio"].variants[name] for name in ("SLM, k 0.2", "SLM, k 0.4")}
    monkeypatch.setattr(stages, "prepare_data", lambda directory: None)
    monkeypatch.setattr(stages, "train", lambda *arguments: None)
    compare.train_all(tmp_path, variants, [1, 2], 1)
    assert sorted(log.name for log in logs) == [f"compare-SLM-k-0.{k}-{seed}.log" for k in (2, 4) for seed in (1, 2)]


def test_seeds_are_added_to_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tables result from one call and from several; runs of a changed study are left out."""
    monkeypatch.setattr(
        stages, "held_out_losses", lambda run, held_out: ([0, 100], [5.0, len(run.name) / 10 + int(run.name[-1])])
    )
    digests = iter(["one", "one", "one", "one", "two"])
    monkeypatch.setattr(stages, "corpora_digest", lambda directory: next(digests))
    study = replace(studies.STUDIES["general"], plot=None)
    json, table = tmp_path / "general.json", tmp_path / "general.md"
    compare.report(tmp_path, "general", study, [1, 2, 3], tmp_path)
    expected = (json.read_text(), table.read_text())
    json.unlink()
    compare.report(tmp_path, "general", study, [3, 1], tmp_path)
    assert table.read_text().endswith("\n\nSeeds: 1, 3.\n")
    compare.report(tmp_path, "general", study, [2], tmp_path)
    assert (json.read_text(), table.read_text()) == expected
    fewer = replace(study, variants=dict(list(study.variants.items())[:2]))
    compare.report(tmp_path, "general", fewer, [2], tmp_path)
    assert table.read_text().endswith("\n\nSeeds: 2.\n")
    assert "seed 1 is omitted, since it has other variants" in capsys.readouterr().out
    compare.report(tmp_path, "general", fewer, [1], tmp_path)
    assert table.read_text().endswith("\n\nSeeds: 1 (corpora two); 2 (corpora one).\n")
    monkeypatch.setattr(stages, "held_out_losses", lambda run, held_out: ([0, 200], [5.0, 4.0]))
    monkeypatch.setattr(stages, "corpora_digest", lambda directory: "two")
    compare.report(tmp_path, "general", fewer, [3], tmp_path)
    assert table.read_text().endswith("\n\nSeeds: 3.\n"), "runs of other lengths are left out"


def test_tables_are_those_of_the_recorded_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are recorded with six digits."""
    monkeypatch.setattr(stages, "held_out_losses", lambda run, held_out: ([0], [4.00024996]))  # recorded as 4.00025
    monkeypatch.setattr(stages, "corpora_digest", lambda directory: "one")
    study = replace(studies.STUDIES["scopes"], plot=None)
    compare.report(tmp_path, "scopes", study, [1, 2], tmp_path)
    recorded = [Curve(**curve) for curve in json.loads((tmp_path / "scopes.json").read_text())]
    assert comparison_table(recorded, study.baseline) in (tmp_path / "scopes.md").read_text()


def test_digest_follows_every_corpus(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in stages.CORPORA:
        study_corpora.write_texts(tmp_path / "data", name, ["text"])
    digests = [stages.corpora_digest(tmp_path), stages.corpora_digest(tmp_path)]
    for name in stages.CORPORA:
        study_corpora.write_texts(tmp_path / "data", name, ["other"])
        digests.append(stages.corpora_digest(tmp_path))
    assert len(set(digests)) == 1 + len(stages.CORPORA) and digests[0] == digests[1]


def test_domains_are_disjoint(tmp_path: Path) -> None:
    def source(number: int) -> str:
        return f'"""Module {number}. {"Prose. " * 40}"""\nx = {number}\n'

    study_corpora.write_texts(tmp_path, "clean_train", ["clean"])
    study_corpora.write_texts(tmp_path, "raw_train", [source(1), "clean", source(2), source(2)[:-4], "y = 3"])
    study_corpora.build_domains(tmp_path)
    texts, code = (study_corpora.read_texts(tmp_path, name) for name in study_corpora.DOMAINS)
    assert code == [source(1)] and len(texts) == 1 and texts[0].startswith("Module 2. Prose.")


def test_documents_with_the_highest_mean_excess_loss_are_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excess = {"base": [1.0, 1, 5, 5, 5, 2, 9], "rm": [0.0, 1, 1, 0, 2, 0, 9]}  # means 0.5, 4, 2, 0
    lengths = np.array([2, 3, 1, 1])
    monkeypatch.setattr(study_corpora, "losses", lambda prefix, name, tokens: np.array(excess[name][:tokens]))
    monkeypatch.setattr(study_corpora, "read_index", lambda prefix: type("Index", (), {"lengths": lengths}))
    (tmp_path / "data").mkdir()
    study_corpora.write_texts(tmp_path / "data", studies.POOL, ["a", "b", "c", "d"])
    study_corpora.build_selected(tmp_path, ["base", "rm"], 0.6)
    assert study_corpora.read_texts(tmp_path / "data", studies.SELECTED) == ["b", "c"]
    study_corpora.write_texts(tmp_path / "data", studies.POOL, ["a"])
    with pytest.raises(ValueError, match=r"has 4 documents, but raw_pool\.jsonl 1"):
        study_corpora.build_selected(tmp_path, ["base", "rm"], 0.6)
