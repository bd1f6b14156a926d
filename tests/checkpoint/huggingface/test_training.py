"""Train from published models, with published reference models, and export the result."""

from __future__ import annotations

import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.checkpoint.tensor_store import TensorStore
from megatron_slm.cli import score_corpus
from megatron_slm.cli.convert_checkpoint import main as convert
from megatron_slm.cli.pretrain import main
from megatron_slm.preprocessing.preprocess import Job, preprocess
from megatron_slm.testing import chat
from megatron_slm.testing.published import Published, save_model
from megatron_slm.testing.ranks import run_ranks
from megatron_slm.testing.tiny import launch, records, run_each
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

RUN = ["--mock-data", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4", "--num-workers", "0"]
RUN += ["--eval-iters", "0", "--train-iters", "2", "--lr", "1e-3", "--bf16"]


@pytest.fixture(scope="module")
def model(published: dict[str, Published]) -> str:
    return str(published["llama"].directory)


def test_runs_start_from_a_published_model_and_are_exported(model: str, tmp_path: Path) -> None:
    """The same command resumes; losses of SLM with the same reference model have no excess."""
    import transformers

    first, slm, imported = tmp_path / "first", tmp_path / "slm", tmp_path / "imported"
    assert convert(["import", "--hf-path", model, "--save", str(imported)]) == 0
    start = ["--load", model, *RUN]
    reference = ["--objective", "slm", "--reference-load", model, "--reference-precision", "bf16"]
    runs = run_each(
        [*start, "--save", str(first)],
        [*start, "--save", str(first), "--train-iters", "3", "--override-opt_param-scheduler"],
        ["--pretrained-checkpoint", model, *RUN, *reference, "--save", str(slm)],
        [*RUN, "--load", str(imported), "--finetune", "--use-checkpoint-args"],
    )
    for run in runs:
        assert run.code == 0, run.errors
    assert f"new run from the weights of {model}" in runs[0].output and "--num-layers 2" in runs[0].output
    assert "resuming from" in runs[1].output
    assert [record["step"] for record in records(first)] == [1, 2, 3]
    assert records(slm)[0]["threshold"] == 0.0
    assert convert(["export", "--load", str(first), "--hf-path", str(tmp_path / "out")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16 and exported.config.eos_token_id == 0


@pytest.mark.slow
def test_fine_tuned_models_generate_answers_in_transformers(tmp_path: Path) -> None:
    """The export has the chat template of the tokenizer, or of --chat-template."""
    import transformers

    base = tmp_path / "base"
    save_model("llama", base, vocab_size=720)
    chat.save_tokenizer(base, chat.CHATML)
    (base / "chat_template.jinja").write_text(chat.CHATML)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(chat.CHATML_TOOLS)
    messages = [{"role": "user", "content": "2 + 2"}]
    examples = [{"messages": [*messages, {"role": "assistant", "content": f"{number}"}]} for number in range(40)]
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_files": TokenizerFiles(model=str(base))}
    corpus = chat.make_examples(tmp_path / "chat", examples, **tokenizer)
    run = ["--load", str(base), *RUN[1:], "--data-path", corpus, "--split", "100,0,0", "--objective", "sft"]
    launch([*run, "--save", str(tmp_path / "run")])
    (tmp_path / "template.jinja").write_text(chat.GENERATION)
    for name, flags in (("own", []), ("given", ["--chat-template", str(tmp_path / "template.jinja")])):
        out = str(tmp_path / name)
        assert convert(["export", "--load", str(tmp_path / "run"), "--hf-path", out, *flags]) == 0
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        default = chat.GENERATION if flags else chat.CHATML
        assert theirs.chat_template == {"default": default, "tool_use": chat.CHATML_TOOLS}
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        exported = transformers.AutoModelForCausalLM.from_pretrained(out)
        answer = exported.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("layout", [{"context": 2}, {"tensor": 2}, {"tensor": 4}], ids=str)
def test_steps_are_independent_of_the_layout(model: str, tmp_path: Path, layout: dict[str, int]) -> None:
    """Four tensor-parallel ranks share the two key/value heads."""
    argv = ["--load", model, *RUN[:-1]]
    launch([*argv, "--save", str(tmp_path / "one")])
    flags = [text for name, size in layout.items() for text in (f"--{name}-model-parallel-size", str(size))]
    flags = [flag.replace("--context-model", "--context") for flag in flags]
    launch([*argv, "--save", str(tmp_path / "two"), *flags], prod(layout.values()))
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    saved, expected = (TensorStore(tmp_path / name / "iter_0000002", "--load") for name in ("two", "one"))
    for key in filter(re.compile("decoder").match, expected.keys()):
        torch.testing.assert_close(saved.read(key, ()), expected.read(key, ()), rtol=0, atol=1e-4)


def _score(rank: int, world_size: int, argv: list[str]) -> int:
    return score_corpus.main(argv)


def test_corpora_are_scored_with_a_published_model(model: str, tmp_path: Path) -> None:
    """The sidecar serves runs that start from the same model: without excess loss."""
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"the {word} ran to the barn " * 9}) for word in ("cat", "dog", "ox"))
    )
    kind = "HuggingFaceTokenizer"
    job = Job([str(text)], ["text"], str(tmp_path / "text"), kind, TokenizerFiles(model=model), append_eod=True)
    preprocess(job)
    corpus = job.prefix("text")
    argv = ["--reference-load", model, "--data-path", corpus, "--reference-scores", "rm", "--context", "stream"]
    assert run_ranks(_score, 1, [*argv, "--seq-length", "128"], initialize=False) == [2]
    assert run_ranks(_score, 1, [*argv, "--seq-length", "32", "--stride", "32"], initialize=False) == [0]
    run = ["--load", model, *RUN[1:-1], "--data-path", corpus, "--split", "100,0,0", "--save", str(tmp_path / "run")]
    launch([*run, "--objective", "slm", "--reference-scores", "rm", "--data-order", "stable"])
    assert abs(records(tmp_path / "run")[0]["threshold"]) < 1  # contexts differ at the start of a window


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_contradicting_flags_are_refused_with_both_values(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--load", model, *RUN, "--hidden-size", 64, "--rotary-base", 500, "--activation", "geglu")
    for text in ("--hidden-size 64", "(32)", "--rotary-base 500", "(10000)", "--activation geglu"):
        assert text in error
    assert model in error
    equal = ["--hidden-size", 32, "--swiglu", "--group-query-attention", "--num-query-groups", 2, "--dry-run"]
    assert main([str(word) for word in ("--load", model, *RUN, *equal)]) == 0


def test_damaged_tokenizer_is_needed_only_if_no_other_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(model, tmp_path / "damaged")
    byte = ["--tokenizer-type", "ByteTokenizer"]
    reference = ["--objective", "slm", "--reference-load", damaged]
    for content in ("{", "[]", "{}"):
        (damaged / "tokenizer.json").write_text(content)
        for argv in (["--load", damaged], ["--pretrained-checkpoint", damaged], ["--load", model, *reference]):
            assert main([str(word) for word in (*argv, *RUN, *byte, "--dry-run")]) == 0
            warning = " ".join(capsys.readouterr().err.split())
            assert f"note: {argv[-2]}: the tokenizer in {damaged} is not compared with ByteTokenizer" in warning
    assert "tokenizer.json" in refused(capsys, "--load", damaged, *RUN, "--dry-run")
    assert convert(["import", "--hf-path", str(damaged), "--save", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 400, "--dry-run"]
    larger = refused(
        capsys, "--hidden-size", 32, "--num-layers", 2, "--num-attention-heads", 4, *RUN, *reference, *null
    )
    assert "a vocabulary of 301 tokens" in larger


def test_places_of_published_models_are_checked(
    model: str, published: dict[str, Published], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no step 3" in refused(capsys, "--load", model, *RUN, "--ckpt-step", 3)
    assert "contains a published model" in refused(capsys, "--load", model, *RUN, "--save", model, "--dry-run")
    save_model("mistral", tmp_path / "window", sliding_window=16)
    for flag in ("--load", "--pretrained-checkpoint"):
        error = refused(capsys, flag, tmp_path / "window", *RUN)
        assert "sliding_window of 16" in error and "--seq-length is 32" in error and flag in error
    byte = ["--tokenizer-type", "ByteTokenizer"]
    assert main([str(word) for word in ("--load", model, *RUN, *byte, "--dry-run")]) == 0
    assert "-> ByteTokenizer of vocabulary size 257" in capsys.readouterr().out
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 400, "--dry-run"]
    assert "--vocab-size 400 contradicts the model" in refused(capsys, "--load", model, *RUN, *null)
    tied = published["llama-tied"].directory
    error = refused(capsys, "--load", tied, *RUN, "--untie-embeddings-and-output-weights")
    assert "--untie-embeddings-and-output-weights on" in error
