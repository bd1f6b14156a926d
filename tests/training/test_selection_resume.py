"""Test that selection settings and the reference model may change on resume, and that changes are printed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from megatron_slm.testing.tiny import command, losses, make_corpus, records, run_each

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two reference models, and runs of four steps, each also stopped after two."""
    directory = tmp_path_factory.mktemp("selection")
    corpus = make_corpus(directory / "corpus", 1)
    commands = [
        command(corpus, directory / name, train_iters=1, eval_iters=0, seed=n) for n, name in enumerate("ab", 1)
    ]
    for name, flags in RUNS.items():
        uninterrupted = [*command(corpus, directory / f"{name}-uninterrupted", train_iters=4, eval_iters=0), *flags]
        part = [*command(corpus, directory / name, train_iters=4, eval_iters=0, exit_interval=2), *flags]
        commands += [_placed(uninterrupted, directory), _placed(part, directory)]
    for code, _, errors in run_each(*commands):
        assert code == 0, errors
    return directory


TOKENS = 16 * 32  # of a global batch
SLM = ["--objective", "slm", "--reference-load", "FOLDER/a", "--slm-selection-ratio", "0.5"]
PREDICTED = [*SLM, "--slm-threshold", "predicted", "--slm-scope", "global-batch"]
RUNS = {"clm": [], "exact": SLM, "predicted": PREDICTED}
# saved run, flags on resume, printed differences, selection of the first step (None: as in the uninterrupted run)
CHANGES: list[tuple[str, list[str], list[str], str | None]] = [
    ("predicted", PREDICTED, [], None),
    ("exact", SLM, [], None),
    ("clm", SLM, ["--objective clm -> slm", "--reference-load none ->"], "exact"),
    ("predicted", [], ["--objective slm -> clm", "--slm-threshold predicted -> exact"], "all"),
    ("exact", [*SLM, "--slm-score", "token-loss"], ["--slm-score excess -> token-loss"], "exact"),
    ("predicted", [*PREDICTED, "--slm-score", "token-loss"], ["--slm-score excess -> token-loss"], "exact"),
    ("exact", [*SLM, "--slm-scope", "sequence"], ["--slm-scope data-parallel -> sequence"], "exact"),
    ("exact", [*SLM, "--slm-exact-mode", "speculative"], ["--slm-exact-mode recompute -> speculative"], "exact"),
    ("exact", PREDICTED, ["--slm-threshold exact -> predicted", "--slm-scope data-parallel -> global-batch"], "exact"),
    ("predicted", SLM, ["--slm-threshold predicted -> exact"], "exact"),
    ("predicted", [*PREDICTED, "--slm-selection-ratio", "0.3"], ["--slm-selection-ratio 0.5 -> 0.3"], "exact"),
    (
        "exact",
        [*SLM, "--slm-score", "stochastic-excess"],
        ["--slm-score excess -> stochastic-excess"],
        "exact",
    ),
    ("predicted", [*PREDICTED, "--slm-mix", "0.1"], ["--slm-mix 0.0 -> 0.1"], "predicted"),
    ("predicted", [*PREDICTED, "--reference-load", "FOLDER/b"], ["--reference-load FOLDER/a -> FOLDER/b"], "exact"),
    (  # the same model
        "predicted",
        [*PREDICTED, "--reference-load", "FOLDER/./a"],
        ["--reference-load FOLDER/a -> FOLDER/./a"],
        None,
    ),
    ("predicted", [*PREDICTED, "--reference-precision", "bf16"], ["--reference-precision unset -> bf16"], "exact"),
]


def kind(save: Path, number: int) -> str:
    """Return the selection type of a step: only a predicted threshold deviates from the requested share."""
    share = records(save)[number]["share_selected"]
    if share == 1:
        return "all"
    ratio = 0.3 if share < 0.4 else 0.5
    return "exact" if share == pytest.approx(math.ceil(ratio * TOKENS) / TOKENS, abs=1e-9) else "predicted"


def _placed(argv: list[str], directory: Path) -> list[str]:
    return [word.replace("FOLDER", str(directory)) for word in argv]


def test_selection_changes_on_resume(directory: Path, tmp_path: Path) -> None:
    corpus = str(directory / "corpus_text_document")
    commands = [
        [*command(corpus, tmp_path / str(number), train_iters=4, eval_iters=0, load=directory / name), *flags]
        for number, (name, flags, _, _) in enumerate(CHANGES)
    ]
    results = run_each(*(_placed(argv, directory) for argv in commands))
    for number, ((name, flags, shown, selection), (code, output, errors)) in enumerate(
        zip(CHANGES, results, strict=True)
    ):
        assert code == 0, (flags, errors)
        lines = [line for line in output.splitlines() if line.startswith("differences from")]
        assert len(lines) == bool(shown) and all(part in lines[0] for part in _placed(shown, directory)), (flags, lines)
        steps = losses(tmp_path / str(number))
        if selection is None:
            assert steps == losses(directory / f"{name}-uninterrupted")[2:], flags
        else:
            assert kind(tmp_path / str(number), 0) == selection, flags


def test_changed_reference_model_is_detected(directory: Path, tmp_path: Path) -> None:
    """Its losses are not comparable with the threshold of the checkpoint."""
    corpus = str(directory / "corpus_text_document")
    shutil.copytree(directory / "a", tmp_path / "rm")
    flags = [*PREDICTED, "--reference-load", str(tmp_path / "rm")]
    argv = _placed(
        [*command(corpus, tmp_path / "run", load=tmp_path / "run", train_iters=6, eval_iters=0), *flags], directory
    )
    first, second = run_each([*argv, "--exit-interval", "2"], [*argv, "--exit-interval", "4"])
    shutil.rmtree(tmp_path / "rm")
    shutil.copytree(directory / "b", tmp_path / "rm")
    dry, third = run_each([*argv, "--dry-run"], argv)
    assert [code for code, _, _ in (first, second, dry, third)] == [0] * 4, (first, second, dry, third)
    assert "has changed" not in second[1]
    for _, output, _ in (dry, third):
        assert f"--reference-load {tmp_path / 'rm'} has changed" in output
    assert [kind(tmp_path / "run", step) for step in range(6)] == ["exact", *["predicted"] * 3, "exact", "predicted"]
