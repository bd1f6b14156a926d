"""Test that invalid user input ends with exit code 2, a message with the flag, and no files left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli.pretrain import main
from megatron_slm.testing.tiny import MODEL, command, launch, make_corpus


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    make_corpus(directory / "corpus", 1)
    launch(command(corpus(directory), directory / "rm", train_iters=1))
    launch(command(corpus(directory), directory / "rm-short", train_iters=1, seq_length=16))
    other = ["NullTokenizer" if word == "ByteTokenizer" else word for word in MODEL]
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus(directory)}{suffix}", f"{directory}/numbers{suffix}")
    launch(command(f"{directory}/numbers", directory / "rm-null", train_iters=1, model=other, vocab_size=300))
    return directory


def corpus(directory: Path) -> str:
    return str(directory / "corpus_text_document")


FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"slm_selection_ratio": 0}, "--slm-selection-ratio is 0.0, and must be in (0, 1]"),
    ({"slm_selection_ratio": -0.5}, "--slm-selection-ratio"),
    ({"slm_selection_ratio": 1.5}, "--slm-selection-ratio"),
    ({"slm_selection_ratio": "nan"}, "--slm-selection-ratio"),
    ({"slm_selection_ratio": "many"}, "--slm-selection-ratio must be a number, not 'many'"),
    ({"slm_mix": 2}, "--slm-mix"),
    ({"slm_score": "exess", "objective": "slm"}, "'exess' is not a score"),
    ({"slm_scope": "galaxy"}, "--slm-scope must be one of sequence, micro-batch, data-parallel"),
    ({"objective": "slm"}, "needs a reference model"),
    ({"objective": "slm", "reference_load": "/nowhere"}, "--reference-load /nowhere"),
    ({"reference_load": "/nowhere"}, "has no effect with --objective clm"),
    ({"tensor_model_parallel_size": 2}, "1 processes were started"),
    ({"num_attention_heads": 5}, "--num-query-groups 4 does not divide --num-attention-heads 5"),
    ({"hidden_size": 33}, "--num-attention-heads 4 does not divide --hidden-size 33"),
    ({"global_batch_size": 12}, "--global-batch-size 12 is not a multiple"),
    ({"micro_batch_size": 0}, "--micro-batch-size is 0"),
    ({"lr": "fast"}, "--lr must be a number"),
    ({"train_iters": 2.5}, "--train-iters must be an integer"),
    ({"min_lr": 1}, "--min-lr 1.0 is above --lr"),
    ({"tokenizer_type": "Magic"}, "--tokenizer-type must be one of"),
    ({"tokenizer_type": "SentencePieceTokenizer"}, "requires --tokenizer-model"),
    ({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "/nowhere"}, "--tokenizer-model /nowhere"),
    ({"vocab_size": 256}, "--vocab-size 256 is below the size"),
    ({"data_path": "/nowhere/corpus"}, "/nowhere/corpus.bin is missing"),
    ({"load": "/nowhere", "finetune": True}, "--load /nowhere: there is no such directory"),
    ({"load": "/nowhere", "exit_on_missing_checkpoint": True}, "--load /nowhere: there is no such directory"),
    ({"transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine"),
    ({"num_layer": 4}, "--num-layer is unknown. Did you mean --num-layers?"),
    ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload is a Megatron-LM flag that is not supported"),
    ({"fp16": True, "bf16": True}, "--fp16 and --bf16 were both given. Give one."),
    ({"config": "/nowhere.yaml"}, "/nowhere.yaml: the recipe cannot be read"),
    ({"save": "/proc/run"}, "--save /proc/run"),
    ({"recompute_granularity": "full"}, "needs --recompute-method"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=lambda value: str(value)[:60])
def test_flag_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], message: str
) -> None:
    argv = command(corpus(workspace), **{"save": tmp_path / "run", "train_iters": 1, **flags})
    expect_refusal(capsys, message, tmp_path, argv)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("empty", "not a checkpoint"),
        ("rm-short", "--seq-length 16, and this run has 32"),
        ("rm-null", "NullTokenizer of vocabulary size 300, and the training model has ByteTokenizer"),
    ],
)
def test_reference_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str, message: str
) -> None:
    (workspace / "empty").mkdir(exist_ok=True)
    flags = {"objective": "slm", "reference_load": workspace / reference, "train_iters": 1}
    expect_refusal(capsys, message, tmp_path, command(corpus(workspace), tmp_path / "run", **flags))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = [
    (".bin", Path.unlink, ".bin is missing"),
    (".idx", Path.unlink, ".idx is missing"),
    (".bin", _cut, "its index requires"),
    (".idx", _cut, "its header requires"),
    (".bin", lambda path: path.write_bytes(b""), "has 0 bytes"),
    (".idx", lambda path: path.write_bytes(b""), "is truncated"),
    (".idx", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is not a Megatron-Core index"),
]


@pytest.mark.parametrize(("suffix", "damage", "message"), DAMAGE, ids=[message for _, _, message in DAMAGE])
def test_damaged_corpus_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, damage: Any, message: str
) -> None:
    prefix = tmp_path / "corpus_text_document"
    for end in (".bin", ".idx", ".corpus.json"):
        shutil.copy(f"{corpus(workspace)}{end}", f"{prefix}{end}")
    damage(Path(f"{prefix}{suffix}"))
    expect_refusal(capsys, message, tmp_path, command(str(prefix), tmp_path / "run", train_iters=1))


def test_corpus_of_another_tokenizer_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "corpus_text_document"
    for end in (".bin", ".idx", ".corpus.json"):
        shutil.copy(f"{corpus(workspace)}{end}", f"{prefix}{end}")
    record = json.loads(Path(f"{prefix}.corpus.json").read_text())
    record["tokenizer"]["fingerprint"] = "another"
    Path(f"{prefix}.corpus.json").write_text(json.dumps(record))
    argv = command(str(prefix), tmp_path / "run", train_iters=1)
    expect_refusal(capsys, "fingerprint another", tmp_path, argv)


def test_id_outside_the_vocabulary_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus has no metadata, as written by Megatron-LM's tool."""
    small = ["NullTokenizer" if word == "ByteTokenizer" else word for word in MODEL]
    argv = command(f"{workspace}/numbers", tmp_path / "run", train_iters=1, model=small, vocab_size=50)
    expect_refusal(capsys, "contains the token id 256, but the vocabulary", tmp_path, argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layer: 3", "num_layer is unknown. Did you mean num_layers?"),
        ("lr: fast", "lr must be a number, not 'fast'"),
        ("- a\n- b", "a recipe must be a mapping of flag names to values"),
        ("lr: [", "not valid YAML"),
    ],
)
def test_recipe_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    argv = command(corpus(workspace), tmp_path / "run", train_iters=1, config=recipe)
    expect_refusal(capsys, message, tmp_path, argv)


def expect_refusal(capsys: pytest.CaptureFixture[str], message: str, directory: Path, argv: list[str]) -> None:
    before = {path for path in directory.rglob("*") if "cache" not in path.parts}
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert "Traceback" not in error
    after = {path for path in directory.rglob("*") if "cache" not in path.parts}
    assert after == before, "a file was written"
