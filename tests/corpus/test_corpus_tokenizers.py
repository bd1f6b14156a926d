"""Validation of corpora against a tokenizer: identity, end-of-document id, and ids outside the vocabulary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.cli import preprocess_data
from megatron_slm.cli.pretrain import main
from megatron_slm.corpus.checks import check_tokenizer
from megatron_slm.corpus.metadata import metadata_path, read_metadata
from megatron_slm.preprocessing.job import Job
from megatron_slm.preprocessing.merge import merge_corpora
from megatron_slm.preprocessing.preprocess import preprocess
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.plain_tokenizers import ByteTokenizer
from megatron_slm.tokenizers.tokenizer import TokenizerFiles, build_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
KIND = "HuggingFaceTokenizer"


def tokenizer_directory(directory: Path, eos: str, post_processor: bool = False) -> TokenizerFiles:
    """Write the fixture's tokenizer with ``eos`` as its eos_token, and optionally without its post-processor."""
    directory.mkdir(exist_ok=True)
    content = json.loads((FIXTURES / "huggingface/tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = content["post_processor"] if post_processor else None
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return TokenizerFiles(str(directory))


def corpus(directory: Path, name: str, files: TokenizerFiles, *, append_eod: bool = True) -> str:
    (directory / "in.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    job = Job([str(directory / "in.jsonl")], ["text"], str(directory / name), KIND, files, append_eod=append_eod)
    preprocess(job)
    return job.prefix("text")


def forget_end(prefix: str, **more: Any) -> None:
    """Rewrite the metadata as an earlier release wrote it."""
    metadata = read_metadata(prefix)
    assert metadata is not None and metadata["tokenizer"].pop("eod") is not None
    metadata["tokenizer"].update(more)
    metadata_path(prefix).write_text(json.dumps(metadata))


def test_corpus_with_another_eod_id_is_rejected(tmp_path: Path) -> None:
    made = tokenizer_directory(tmp_path / "a", "</s>")
    prefix = corpus(tmp_path, "out", made)
    same, other = (
        build_tokenizer(KIND, tokenizer_directory(tmp_path / name, eos)) for name, eos in (("b", "</s>"), ("c", "<s>"))
    )
    check_tokenizer(prefix, same, "--data-path")
    message = rf"of end-of-document id {same.eod}, but this run uses .* {other.eod} .*Set --eod-id {same.eod}"
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(prefix, other, "--data-path")
    flag = build_tokenizer(KIND, replace(tokenizer_directory(tmp_path / "c", "<s>"), eod_id=same.eod))
    check_tokenizer(prefix, flag, "--data-path")


@pytest.mark.parametrize("has_metadata", [True, False])  # Megatron-LM writes no metadata
@pytest.mark.parametrize("append_eod", [True, False])
def test_corpus_without_recorded_eod_id_is_accepted_if_its_documents_end_with_it(
    tmp_path: Path, append_eod: bool, has_metadata: bool
) -> None:
    made = tokenizer_directory(tmp_path / "a", "</s>")
    prefix = corpus(tmp_path, "out", made, append_eod=append_eod)
    if has_metadata:
        forget_end(prefix)
    else:
        metadata_path(prefix).unlink()
    check_tokenizer(prefix, build_tokenizer(KIND, made), "--data-path")
    other = build_tokenizer(KIND, tokenizer_directory(tmp_path / "c", "<s>"))
    if append_eod:
        with pytest.raises(ConfigError, match=r"ends its documents with the id 2, .*Set --eod-id 2"):
            check_tokenizer(prefix, other, "--data-path")
    else:
        check_tokenizer(prefix, other, "--data-path")


def test_token_appended_by_the_tokenizer_is_not_taken_for_the_eod_token(tmp_path: Path) -> None:
    made = tokenizer_directory(tmp_path / "a", "<|endoftext|>", post_processor=True)
    prefix = corpus(tmp_path, "out", made, append_eod=False)
    forget_end(prefix)
    check_tokenizer(prefix, build_tokenizer(KIND, made), "--data-path")


def test_corpus_that_recorded_the_entry_count_is_accepted(tmp_path: Path) -> None:
    files = tokenizer_directory(tmp_path / "a", "</s>")
    content = json.loads((tmp_path / "a/tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] = 5000
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(content))
    tokenizer = build_tokenizer(KIND, files)
    assert tokenizer.vocab_size == 5001 and tokenizer.entries == len(vocab)
    prefix = corpus(tmp_path, "out", files)
    forget_end(prefix, vocab_size=tokenizer.entries)
    check_tokenizer(prefix, tokenizer, "--data-path")
    forget_end_of = read_metadata(prefix)
    assert forget_end_of is not None
    forget_end_of["tokenizer"]["vocab_size"] = 600
    metadata_path(prefix).write_text(json.dumps(forget_end_of))
    with pytest.raises(ConfigError, match=r"of vocabulary size 600, but this run uses HuggingFaceTokenizer of .* 5001"):
        check_tokenizer(prefix, tokenizer, "--data-path")


def test_merging_corpora_with_different_eod_ids_is_rejected(tmp_path: Path) -> None:
    prefixes = [
        corpus(tmp_path, f"out-{name}", tokenizer_directory(tmp_path / name, eos))
        for name, eos in (("a", "</s>"), ("b", "<s>"))
    ]
    with pytest.raises(ConfigError, match=r"of end-of-document id 1, but .* of end-of-document id 2\. Recreate them"):
        merge_corpora(prefixes, str(tmp_path / "merged"))


def test_duplicate_eod_token_causes_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus(tmp_path, "once", tokenizer_directory(tmp_path / "a", "</s>"))
    corpus(tmp_path, "not", tokenizer_directory(tmp_path / "b", "</s>", post_processor=True), append_eod=False)
    corpus(tmp_path, "other", tokenizer_directory(tmp_path / "c", "<|endoftext|>", post_processor=True))
    assert "warning" not in capsys.readouterr().err
    corpus(tmp_path, "twice", tokenizer_directory(tmp_path / "b", "</s>", post_processor=True))
    assert "already appends the end-of-document token to every text, and --append-eod adds" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_id_outside_the_vocabulary_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def encode(self: ByteTokenizer, text: str) -> list[int]:
        return [1, 300] if text == "bad" else [1, 2]

    monkeypatch.setattr(ByteTokenizer, "encode", encode)
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n')
    job = Job([str(tmp_path / "in.jsonl")], ["text"], str(tmp_path / "out"), "ByteTokenizer", TokenizerFiles())
    with pytest.raises(ConfigError, match=r"in.jsonl, lines 1 to 2: ByteTokenizer produced the id 300, outside its"):
        preprocess(replace(job, workers=workers))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_corpus_with_ids_outside_the_vocabulary_is_rejected_despite_matching_metadata(tmp_path: Path) -> None:
    files = tokenizer_directory(tmp_path / "a", "</s>")
    prefix = corpus(tmp_path, "out", files)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[2:4] = (60_000).to_bytes(2, "little")
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(ConfigError, match="contains the token id 60000"):
        check_tokenizer(prefix, build_tokenizer(KIND, files), "--data-path")


def test_trainer_accepts_the_flags_that_made_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one two three four"}\n' * 50)
    kind = ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(FIXTURES / "tiktoken.json")]
    kind += ["--vocab-size", "300", "--tiktoken-num-special-tokens", "10"]
    pattern = ["--tiktoken-pattern", "v1"]
    flags = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"), *kind, *pattern]
    preprocess(preprocess_data.make_job(preprocess_data.parse_arguments(flags)))
    model = ["--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "16"]
    run = ["--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-3", "--split", "1,0,0", "--eval-iters", "0"]
    command = [*model, *run, "--data-path", str(tmp_path / "out_text_document"), *kind, "--dry-run"]
    assert main([*command, *pattern]) == 0
    assert main(command) == 2
    assert "was made with TikTokenizer of fingerprint" in capsys.readouterr().err
    assert main([*command, *pattern, "--eod-id", "5"]) == 2
    assert "end-of-document id 2, but this run uses TikTokenizer of end-of-document id 5" in capsys.readouterr().err
