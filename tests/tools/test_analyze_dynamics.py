"""The command line of the token dynamics on the checkpoints of a tiny run: results, kept losses, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_slm.analysis.token_categories import CATEGORIES
from megatron_slm.cli import analyze_dynamics
from megatron_slm.cli.analyze_dynamics import LOSSES, PLOT, RESULT
from megatron_slm.config.checkpoint_files import MANIFEST_FILE
from megatron_slm.evaluation import token_losses
from megatron_slm.evaluation.token_losses import TokenSet, run_steps
from megatron_slm.inference.scoring import TokenScores
from megatron_slm.runtime.errors import ConfigError, DivergedError
from megatron_slm.testing.tiny import Outcome, command, launch_each, make_corpus, records, run_each
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dynamics")
    corpus, other = (make_corpus(directory / name, seed, documents=12) for seed, name in enumerate(("corpus", "other")))
    base = {"num_layers": 1, "eval_interval": 1, "full_validation": True}
    launch_each(
        [
            command(corpus, directory / "run", train_iters=7, save_interval=1, **base),
            command(other, directory / "rm", train_iters=1, num_layers=1),
            command(other, directory / "short", train_iters=1, num_layers=1, seq_length=16, max_position_embeddings=16),
        ]
    )
    return directory


def run(*argvs: list[str], ranks: int = 1) -> list[Outcome]:
    return run_each(*argvs, main=analyze_dynamics.main, ranks=ranks)


def flags(directory: Path, output: str, **more: object) -> list[str]:
    settings = {"load": directory / "run", "data-path": directory / "corpus_text_document", **more}
    return ["--output", str(directory / output), *(str(a) for n, v in settings.items() for a in (f"--{n}", v))]


def test_results_and_kept_losses(workspace: Path) -> None:
    argv = flags(workspace, "out", **{"reference-load": workspace / "rm"})
    (outcome,) = run(argv)
    assert outcome.code == 0, outcome.errors
    result = json.loads((workspace / "out" / RESULT).read_text(encoding="utf-8"))
    assert result["steps"] == [1, 2, 3, 4, 5, 6, 7] and result["tokens"][0] == 16 * 32
    evaluated = {record["step"]: record["loss"] for record in records(workspace / "run", "eval")}
    expected = [evaluated[step] for step in result["steps"]]
    assert result["loss"] == pytest.approx(expected, rel=0.01), "the trainer's evaluation has the same windows"
    assert len(result["selection"]["perplexity"]) == 7 and "sigmoid" in result["fits"]
    assert (workspace / "out" / PLOT).is_file()


def test_only_damaged_losses_are_computed_again(workspace: Path) -> None:
    argv = flags(workspace, "again", steps=1)
    argv[argv.index("--steps") + 2 : argv.index("--steps") + 2] = ["3", "4"]
    (outcome,) = run(argv)
    assert outcome.code == 0, outcome.errors
    assert "no sigmoids are fitted: they need 7 checkpoints or more, all after step 0" in outcome.output
    before = json.loads((workspace / "again" / RESULT).read_text(encoding="utf-8"))
    files = sorted((workspace / "again" / LOSSES).iterdir())
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(contents[0][:200])
    np.save(files[1], np.zeros(3, np.float32))
    kept = files[2].stat().st_mtime_ns
    (outcome,) = run(argv)
    assert outcome.code == 0, outcome.errors
    assert [file.read_bytes() for file in files] == contents and files[2].stat().st_mtime_ns == kept
    assert json.loads((workspace / "again" / RESULT).read_text(encoding="utf-8")) == before


@pytest.mark.slow
def test_ranks_agree_with_one_process(workspace: Path) -> None:
    one = flags(workspace, "one", steps=2)
    one[one.index("--steps") + 2 : one.index("--steps") + 2] = ["6"]
    two = [str(workspace / "two") if word == str(workspace / "one") else word for word in one]
    assert run(one)[0].code == 0
    assert run([*two, "--tensor-model-parallel-size", "2"], ranks=2)[0].code == 0
    results = [json.loads((workspace / name / RESULT).read_text(encoding="utf-8")) for name in ("one", "two")]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


def test_special_tokens_are_not_code() -> None:
    class Tokenizer(ByteTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            return "".join({self.eod: "<|im_end|>", 1: "<s>"}.get(token, chr(token % 256)) for token in ids)

    tokenizer = Tokenizer(TokenizerFiles())
    tokenizer.special_ids = frozenset((1,))
    tokens = TokenSet(np.array([0, 1, ord("a"), tokenizer.eod, ord("+")]), 4, "")
    found = analyze_dynamics._categories(tokens, tokenizer)
    assert [CATEGORIES[place] for place in found] == ["other", "words", "other", "code"]


@pytest.mark.parametrize("flag", ["--load", "--reference-load"])
def test_losses_that_are_not_finite_end_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """The exit code is 3, as in training and in scoring, and nothing is kept."""
    tokens = TokenSet(np.arange(4), 3, "")
    scores = TokenScores(np.array([-1, np.nan, -1], np.float32), np.zeros(3, np.bool_))
    monkeypatch.setattr(token_losses, "_key", lambda *_: "key")
    monkeypatch.setattr(token_losses, "score_tokens", lambda *_, **__: [scores])
    model = SimpleNamespace(context_length=3)
    settings = {"flag": flag, "precision": None, "batch_size": 1, "label": "step-0000001"}
    with pytest.raises(DivergedError, match=f"{flag} run: step-0000001 has NaN or infinite losses"):
        token_losses.checkpoint_losses("run", 1, tokens, tmp_path, lambda: model, **settings)
    assert not list(tmp_path.iterdir())


def test_too_few_requested_steps_are_refused(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"iter_{step:07d}").mkdir()
        (tmp_path / f"iter_{step:07d}" / MANIFEST_FILE).touch()
    assert run_steps(str(tmp_path), [3, 1, 3]) == [1, 3]
    with pytest.raises(ConfigError, match=r"--steps names one checkpoint, .* The complete steps are 1, 2, 3\."):
        run_steps(str(tmp_path), [3, 3])


def test_refusals(workspace: Path) -> None:
    (workspace / "foreign").mkdir(exist_ok=True)
    (workspace / "foreign" / RESULT).write_text("{}", encoding="utf-8")
    shutil.copytree(workspace / "run", workspace / "cut", dirs_exist_ok=True)
    next((workspace / "cut" / "iter_0000006").glob("*.distcp")).unlink()
    cases = [
        (flags(workspace, "no", load=workspace / "rm"), "1 complete checkpoints, and token dynamics need at least two"),
        (flags(workspace, "no", steps=9), "has no complete checkpoint of step 9"),
        (flags(workspace, "no", load=workspace / "nothing"), "0 complete checkpoints"),
        (flags(workspace, "no", **{"data-path": workspace / "nothing"}), "is missing"),
        (flags(workspace, "no", **{"seq-length": 64}), "has a context of 32 tokens"),
        (flags(workspace, "no", load=workspace / "cut"), "iter_0000006"),
        (flags(workspace, "no", **{"reference-load": workspace / "short"}), "short has a context of 16 tokens"),
        (flags(workspace, "no", tokens=0), "--tokens is 0, and must be above 0"),
        (flags(workspace, "no", **{"slm-selection-ratio": 0}), "must be in (0, 1]"),
        (flags(workspace, "no", **{"reference-ckpt-step": 1}), "no effect without --reference-load"),
        (flags(workspace, "no", **{"slm-selection-ratio": 0.3}), "no effect without --reference-load"),
        (flags(workspace, "foreign"), "exists and was not written by megatron_slm"),
    ]
    for (_, message), outcome in zip(cases, run(*(argv for argv, _ in cases)), strict=True):
        assert outcome.code == 2 and message in outcome.errors, (message, outcome.errors)
    assert not (workspace / "no").exists(), "refused before anything is written"
    assert [path.name for path in (workspace / "foreign").iterdir()] == [RESULT]
