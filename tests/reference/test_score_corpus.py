"""Test the command line of score_corpus: its output, and refusals with exit code 2 before any file is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import score_corpus
from megatron_slm.config.recipe import from_flat_dict
from megatron_slm.scores.sidecar import read_header
from megatron_slm.testing.tiny import command, launch, make_corpus, records, run_each


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tool")
    launch(command(make_corpus(directory / "corpus", 1), directory / "rm", train_iters=1))
    return directory


def argv(directory: Path, corpus: Path, **flags: Any) -> list[str]:
    values = {
        "reference_load": directory / "rm",
        "data_path": corpus / "corpus_text_document",
        "reference_scores": "new",
    }
    values |= flags
    words = {name: value if isinstance(value, list) else [str(value)] for name, value in values.items()}
    return [part for name, given in words.items() for part in (f"--{name.replace('_', '-')}", *given)]


def test_score_then_train(workspace: Path) -> None:
    scoring = [*argv(workspace, workspace, reference_scores="once"), "--entropy"]
    [result] = run_each(scoring, main=score_corpus.main)
    assert result.code == 0, result.errors
    path = workspace / "corpus_text_document.once.scores"
    tokens = (workspace / "corpus_text_document.bin").stat().st_size // 2
    assert f"{path}: {tokens:,} tokens" in result.output and "tokens/s" in result.output
    assert read_header(path).tokens == tokens
    corpus = str(workspace / "corpus_text_document")
    launch(command(corpus, workspace / "slm", train_iters=2, objective="slm", reference_scores="once"))
    assert [record["share_selected"] for record in records(workspace / "slm")] == pytest.approx([0.6, 0.6], abs=0.01)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"reference_load": "/nowhere"}, "--reference-load /nowhere: there is no such directory"),
    ({"reference_ckpt_step": 7}, "step 7 (--reference-ckpt-step) does not exist. Existing steps: "),
    ({"data_path": "/nowhere"}, "--data-path /nowhere: /nowhere.bin is missing"),
    ({"stride": 0}, "--stride is 0, and must be from 1 to 32, the model's --seq-length"),
    ({"stride": 33}, "--stride is 33, and must be from 1 to 32"),
    ({"micro_batch_size": 0}, "--micro-batch-size is 0, and must be above 0"),
    ({"pipeline_model_parallel_size": -1}, "--pipeline-model-parallel-size is -1"),
    ({"slm_hang_timeout": -1}, "--slm-hang-timeout is -1, and must be at least 0"),
    ({"reference_scores": "rm.scores"}, "--reference-scores rm.scores: omit the suffix .scores"),
    ({"data_path": ["/a/x", "/b/x"], "reference_scores": "/fast/rm"}, "/a/x and /b/x have the same name, and thus the"),
    ({"score_bytes": 1}, "--score-bytes is not supported. Values have two bytes; leave the flag out."),
    ({"score_byte": 2}, "unknown flag --score-byte"),
    ({"tensor_model_parallel_size": 2}, "1 processes were started"),
    ({"reference_scores": "/proc/rm"}, "/proc/corpus_text_document.rm.scores.partial cannot be written"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSALS, ids=lambda value: str(value)[:60])
def test_flags_are_refused(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    message: str,
) -> None:
    _copy(workspace, tmp_path)
    refused(capsys, tmp_path, argv(workspace, tmp_path, **flags), message)


def test_mismatched_corpus_is_refused(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus has another tokenizer, or is truncated."""
    _copy(workspace, tmp_path)
    metadata = tmp_path / "corpus_text_document.corpus.json"
    content = json.loads(metadata.read_text())
    content["tokenizer"]["fingerprint"] = "another"
    metadata.write_text(json.dumps(content))
    refused(capsys, tmp_path, argv(workspace, tmp_path), "fingerprint another, but this run uses ByteTokenizer")
    metadata.unlink()
    truncated = tmp_path / "corpus_text_document.bin"
    truncated.write_bytes(truncated.read_bytes()[:-2])
    refused(capsys, tmp_path, argv(workspace, tmp_path), "its index requires")


def test_tokenizer_flags_replace_the_settings_of_the_reference_model(tmp_path: Path) -> None:
    saved = from_flat_dict({"tokenizer_type": "NullTokenizer", "vocab_size": 300, "eod_id": 7}, "test")
    arguments = argv(tmp_path, tmp_path)
    for more, eod in (([], 7), (["--eod-id", "9"], 9)):
        tokenizer = score_corpus.find_tokenizer(saved, score_corpus.parse_arguments([*arguments, *more]))
        assert (tokenizer.eod, tokenizer.vocab_size) == (eod, 300)


def _copy(workspace: Path, directory: Path) -> None:
    for suffix in (".bin", ".idx", ".corpus.json"):
        shutil.copy(workspace / f"corpus_text_document{suffix}", directory)


def refused(capsys: pytest.CaptureFixture[str], directory: Path, arguments: list[str], message: str) -> None:
    before = set(directory.rglob("*"))
    assert score_corpus.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error
    assert set(directory.rglob("*")) == before, "a file was written"
