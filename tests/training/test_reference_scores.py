"""Test training with score sidecars: layouts agree, sidecars are combined, and mismatched ones are refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from former_sidecars import make_former

from megatron_slm.cli import score_corpus
from megatron_slm.cli.pretrain import main
from megatron_slm.config.schema import ParallelConfig, ReferenceConfig
from megatron_slm.reference.scoring import ScoringJob, score_corpora
from megatron_slm.runtime import process
from megatron_slm.runtime.checksums import text_checksum
from megatron_slm.runtime.console import make_console
from megatron_slm.runtime.groups import ParallelLayout
from megatron_slm.scores.sidecar import HEADER_BYTES
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import command, launch, launch_each, make_corpus, records
from megatron_slm.tokenizers.tokenizer import ByteTokenizer, TokenizerFiles


def _score(rank: int, world_size: int, jobs: list[ScoringJob]) -> None:
    groups = process.start(ParallelLayout())
    for job in jobs:
        score_corpora(job, ByteTokenizer(TokenizerFiles()), groups, make_console(False))
    process.stop()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create two corpora, two reference models, a base model, and sidecars: rm and other for both, plain for one."""
    directory = tmp_path_factory.mktemp("sidecars")
    one, two = (make_corpus(directory / name, seed, documents=20) for seed, name in ((1, "one"), (2, "two")))
    models = (("rm", two, 4), ("other", one, 2), ("base", one, 3))
    launch_each(
        [command(corpus, directory / name, train_iters=n, num_layers=2, eval_iters=0) for name, corpus, n in models]
    )
    jobs = [
        _job(directory, "rm", "rm", [one, two], with_entropy=True),
        _job(directory, "other", "other", [one, two], with_entropy=True),
        _job(directory, "plain", "rm", [one]),
        _job(directory, "mixed", "rm", [one]),
        _job(directory, "mixed", "other", [two]),
        _job(directory, "stride", "rm", [one]),
        _job(directory, "stride", "rm", [two], stride=8),
    ]
    run_ranks(_score, 1, jobs, initialize=False)
    launch(slm(directory, "single", losses_only=True))
    return directory


def _job(directory: Path, name: str, model: str, corpora: list[str], **settings: Any) -> ScoringJob:
    reference = ReferenceConfig(reference_load=[str(directory / model)])
    return ScoringJob(reference, corpora, name, ParallelConfig(), **settings)


def blend(directory: Path) -> list[str]:
    return ["0.6", str(directory / "one_text_document"), "0.4", str(directory / "two_text_document")]


def slm(directory: Path, save: str | None, tp: int = 1, pp: int = 1, dp: int = 1, **flags: Any) -> list[str]:
    """Return the command of a run on the blend with two sidecars, selecting by excess loss and entropy."""
    settings = {
        "data_path": blend(directory),
        "objective": "slm",
        "slm_score": "excess:0.7 and reference-entropy:0.8",
        "reference_scores": ["rm", "other"],
        "reference_combine": "min",
        "train_iters": 3,
        "num_layers": 2,
        "load": directory / "base",
        "finetune": True,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        **flags,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return command(str(directory / "one_text_document"), None if save is None else directory / save, dp=dp, **given)


@pytest.mark.parametrize(("tp", "pp", "dp", "cp"), [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)])
def test_every_layout_agrees_with_one_process(workspace: Path, tp: int, pp: int, dp: int, cp: int) -> None:
    name = f"tp{tp}pp{pp}dp{dp}cp{cp}"
    launch(slm(workspace, name, tp, pp, dp, context_parallel_size=cp, losses_only=True), 2)
    for one, many in zip(records(workspace / "single"), records(workspace / name), strict=True):
        assert 0.3 < many["share_selected"] < 0.8
        assert many["selection"] == one["selection"], "another set of tokens was selected"
        for figure in ("loss", "loss_all", "loss_unselected", "threshold", "grad_norm"):
            assert many[figure] == pytest.approx(one[figure], rel=2e-4, abs=2e-5), figure


def test_weights_choose_the_reference_model(workspace: Path) -> None:
    """If one sidecar has nearly all of the weight, the selection equals that of this sidecar without the other."""
    common: dict[str, Any] = {"slm_score": "reference-loss", "train_iters": 1, "losses_only": True}
    runs = (("one", ["rm"], None), ("two", ["other"], None), ("weighted", ["rm", "other"], "1,1e-12"))
    launch_each(
        [
            slm(workspace, name, **common, reference_scores=scores, reference_combine=combine)
            for name, scores, combine in runs
        ]
    )
    one, two, weighted = (records(workspace / name)[0]["selection"] for name in ("one", "two", "weighted"))
    assert weighted == one != two


def test_sidecars_add_no_flops(workspace: Path) -> None:
    """FLOP/s of a run with sidecars equal those of CLM."""
    flags = {"data_path": blend(workspace), "train_iters": 1, "num_layers": 2}
    launch(command(str(workspace / "one_text_document"), workspace / "clm", **flags))
    clm, slm_run = (records(workspace / name)[0] for name in ("clm", "single"))
    flops = [record["tflops"] / record["tokens_per_second"] for record in (clm, slm_run)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-9)


def test_dry_run_shows_the_sidecars(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(slm(workspace, None, dry_run=True)) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "sidecars rm, other, combined by min: no forward pass of a reference model" in shown


REFUSALS: list[tuple[dict[str, Any], list[str]]] = [
    ({"reference_load": "rm"}, ["--reference-load and --reference-scores were both given"]),
    ({"objective": "clm"}, ["--reference-scores has no effect with --objective clm"]),
    ({"reference_scores": ["rm", "rm"]}, ["--reference-scores names rm twice"]),
    ({"reference_scores": ["rm.scores", "other"]}, ["--reference-scores rm.scores: omit the suffix .scores"]),
    ({"reference_scores": ["rm"]}, ["--reference-combine min has no effect without two"]),
    ({"reference_combine": "most"}, ["--reference-combine must be mean, min, or weights"]),
    ({"reference_combine": "1,2,3"}, ["--reference-combine 1,2,3: expected one weight per reference model, 2, not 3"]),
    ({"reference_combine": "1,-2"}, ["--reference-combine 1,-2: every weight must be above 0"]),
    (
        {"reference_scores": ["rm", "absent"]},
        ["one_text_document.absent.scores is missing. Create it with tools/score"],
    ),
    ({"reference_scores": ["rm", "/no/rm2"]}, ["/no/one_text_document.rm2.scores is missing"]),
    ({"slm_score": "excess", "reference_scores": ["rm", "plain"]}, ["two_text_document.plain.scores is missing"]),
    (
        {"slm_score": "excess", "reference_scores": ["rm", "mixed"]},
        ["one_text_document.mixed.scores was made with the reference model", "Score all corpora"],
    ),
    (
        {"slm_score": "excess", "reference_scores": ["rm", "stride"]},
        ["stride 16", "stride 8", "with the same reference model and context"],
    ),
    (
        {"data_path": "one", "reference_scores": ["rm", "plain"]},
        ["one_text_document.plain.scores has no entropies", "--entropy"],
    ),
    ({"reference_scores": None, "reference_combine": None}, ["needs a reference model", "--reference-scores"]),
]


@pytest.mark.parametrize(("flags", "messages"), REFUSALS, ids=lambda value: str(value)[:70])
def test_flags_are_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], messages: list[str]
) -> None:
    if "reference_load" in flags:
        flags = {"reference_load": workspace / "rm"}
    if flags.get("data_path") == "one":
        flags = {**flags, "data_path": [str(workspace / "one_text_document")]}
    expect_refusal(capsys, messages, slm(workspace, str(tmp_path / "run"), **flags), tmp_path)


def _edit_header(path: Path, **facts: Any) -> None:
    block = path.read_bytes()
    header = json.loads(block[8:HEADER_BYTES]) | facts
    del header["header_checksum"]
    header["header_checksum"] = text_checksum(json.dumps(header, sort_keys=True))
    path.write_bytes(block[:8] + json.dumps(header).encode().ljust(HEADER_BYTES - 8) + block[HEADER_BYTES:])


def _touch_corpus(path: Path) -> None:
    corpus = path.with_name("one_text_document.bin")
    content = bytearray(corpus.read_bytes())
    content[100] ^= 1
    corpus.write_bytes(bytes(content))


DAMAGE: list[tuple[Any, list[str]]] = [
    (lambda path: path.write_bytes(path.read_bytes()[:-5]), ["bytes, but its header requires"]),
    (lambda path: path.rename(f"{path}.partial"), ["is not finished yet. Run tools/score_corpus.py"]),
    (
        lambda path: _edit_header(path, tokenizer="ByteTokenizer beef"),
        ["the tokenizer ByteTokenizer beef, but this run"],
    ),
    (
        lambda path: _edit_header(path, eod=5),
        ["was made with the end-of-document id 5, but this run uses 256. Set --eod-id 5, or"],
    ),
    (_touch_corpus, ["was made for a corpus of fingerprint", "one_text_document has"]),
    (lambda path: path.write_bytes(b"\x89PNG" * 2000), ["is not a score sidecar"]),
]


@pytest.mark.parametrize(("damage", "messages"), DAMAGE, ids=[messages[0] for _, messages in DAMAGE])
def test_mismatched_sidecar_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, messages: list[str]
) -> None:
    for suffix in (".bin", ".idx", ".corpus.json", ".rm.scores"):
        shutil.copy(workspace / f"one_text_document{suffix}", tmp_path)
    damage(tmp_path / "one_text_document.rm.scores")
    argv = slm(
        workspace,
        str(tmp_path / "run"),
        data_path=[str(tmp_path / "one_text_document")],
        reference_scores=["rm"],
        reference_combine=None,
    )
    expect_refusal(capsys, messages, argv, tmp_path)
    if damage is _touch_corpus:
        assert len({word for word in capsys_words(argv, capsys) if len(word.strip(".,")) == 64}) == 2, "both hashes"


def test_one_byte_sidecar_is_refused_with_a_rescoring_command(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".bin", ".idx", ".corpus.json", ".rm.scores"):
        shutil.copy(workspace / f"one_text_document{suffix}", tmp_path)
    sidecar, corpus = tmp_path / "one_text_document.rm.scores", tmp_path / "one_text_document"
    content = sidecar.read_bytes()
    make_former(sidecar, 3, width=1)
    argv = slm(workspace, None, data_path=[str(corpus)], reference_scores=["rm"], reference_combine=None, dry_run=True)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "one-byte format" in error
    program, tool, *words = shlex.split(error.strip().splitlines()[-1])
    assert (program, tool) == ("python", "tools/score_corpus.py")
    assert score_corpus.main([str(workspace / "rm") if word == "CHECKPOINT" else word for word in words]) == 0
    assert sidecar.read_bytes() == content
    assert main(argv) == 0


def test_one_reference_model_under_two_names_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ensemble of sidecars with one reference model twice would weigh it twice."""
    for suffix in (".bin", ".idx", ".corpus.json", ".rm.scores"):
        shutil.copy(workspace / f"one_text_document{suffix}", tmp_path)
    corpus = tmp_path / "one_text_document"
    shutil.copy(f"{corpus}.rm.scores", f"{corpus}.other.scores")
    names = ["rm", "other"]
    argv = slm(workspace, None, data_path=[str(corpus)], reference_scores=names, reference_combine="mean", dry_run=True)
    expect_refusal(capsys, ["other.scores contain the scores of the same reference model"], argv, tmp_path)


def capsys_words(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(argv) == 2
    return capsys.readouterr().err.split()


def expect_refusal(capsys: pytest.CaptureFixture[str], messages: list[str], argv: list[str], directory: Path) -> None:
    before = set(directory.rglob("*"))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages), error
    assert "Traceback" not in error
    assert set(directory.rglob("*")) == before, "a file was written"
