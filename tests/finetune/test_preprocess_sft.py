"""The data tool of fine-tuning: formats of records, reports by file and line, long examples, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.corpus.index import mapped_tokens, read_index
from megatron_slm.corpus.loss_masks import LossMask, check_mask, mask_path
from megatron_slm.finetune import preprocess
from megatron_slm.finetune.preprocess import FinetuneJob, preprocess_examples
from megatron_slm.finetune.records import Completion, Conversation, RecordReader
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.testing.chat import CHATML, make_examples, save_tokenizer, write_records
from megatron_slm.testing.corpus_files import run_tool
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

PAIR = {"prompt": "one ", "completion": "two"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def texts(prefix: str) -> list[tuple[bytes, bytes]]:
    """Return the bytes of every example of a ByteTokenizer, and those of its answers; | is the end of document."""
    index, mask = read_index(prefix), LossMask(prefix, "answers")
    found = []
    for pointer, length in zip(index.pointers // 2, index.lengths, strict=True):
        ids = np.array(mapped_tokens(index)[pointer : pointer + length])
        ids[ids == 256] = ord("|")
        found.append((bytes(ids.tolist()), bytes(ids[mask.get(pointer, pointer + length)].tolist())))
    return found


def test_prompts_and_completions(tmp_path: Path) -> None:
    records = [{"prompt": f"p{number}" * number, "completion": "é" * (number + 1)} for number in range(20)]
    prefix = make_examples(tmp_path / "x", records)
    pairs = [(r["prompt"].encode(), r["completion"].encode() + b"|") for r in records]
    expected = [(prompt + answer, (prompt + answer)[max(len(prompt), 1) :]) for prompt, answer in pairs]
    assert texts(prefix) == expected, "the first token of an example is never predicted"
    assert check_mask(prefix, "answers").selected == sum(len(answer) for _, answer in expected)


def test_workers_and_input_files_give_the_same_corpus(tmp_path: Path) -> None:
    tokenizer = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_files": TokenizerFiles(model=save_tokenizer(tmp_path / "tok", CHATML)),
    }
    one = make_examples(tmp_path / "one", [CHAT, PAIR] * 20, **tokenizer)
    files = [write_records(tmp_path / f"part{number}.jsonl", [CHAT, PAIR] * 10) for number in range(2)]
    two = FinetuneJob(files, str(tmp_path / "two"), workers=2, **tokenizer)
    assert preprocess_examples(two).examples == 40
    for suffix in (".bin", ".idx"):
        assert Path(one + suffix).read_bytes() == Path(two.prefix + suffix).read_bytes()
    assert mask_path(one, "answers").read_bytes() == mask_path(two.prefix, "answers").read_bytes()


def test_formats_of_conversations() -> None:
    read = RecordReader()
    messages = CHAT["messages"]

    def only(text: str) -> Any:
        [record] = read(text.encode())
        return record

    assert only('{"prompt": "a", "completion": "b", "id": 3}') == Completion("a", "b")
    turns = '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'
    assert only(f'{{"conversations": {turns}}}') == Conversation(messages)
    assert only(f'{{"conversations": {turns}, "system": "s"}}').messages[0] == {"role": "system", "content": "s"}
    parts = '[{"role": "user", "content": [{"type": "text", "text": "q"}]}]'
    answer = '[{"role": "assistant", "content": "a"}]'
    assert only(f'{{"prompt": {parts}, "completion": {answer}}}') == Conversation(messages, None, 1)
    assert only(f'{{"messages": {parts}, "tools": "[{{\\"name\\": \\"f\\"}}]"}}').tools == [{"name": "f"}]


def test_other_published_formats() -> None:
    """Alpaca's keys, OpenAI's arguments as JSON texts, and null entries, which tables and their exports have."""
    read = RecordReader()
    alpaca = {"instruction": "add", "input": "1 2", "output": "3", "system": None, "history": [["q", "a"]]}
    [record] = read(json.dumps(alpaca).encode())
    roles = ["user", "assistant"] * 2
    expected = ["q", "a", "add\n1 2", "3"]
    assert record == Conversation([{"role": r, "content": t} for r, t in zip(roles, expected, strict=True)])
    for arguments, wanted in (('{"x": 1}', {"x": 1}), ("x", "x"), ("[1]", "[1]")):
        message = {"role": "assistant", "content": None, "name": None}
        message["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        [record] = read(json.dumps({"messages": [message]}).encode())
        assert set(record.messages[0]) == {"role", "content", "tool_calls"} and record.messages[0]["content"] == ""
        assert record.messages[0]["tool_calls"][0]["function"]["arguments"] == wanted


def test_tables_equal_lines(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [CHAT, {"messages": [*CHAT["messages"], {"role": "assistant", "content": "b", "name": "x"}]}] * 3
    table = pa.Table.from_pylist([{**record, "prompt_id": 1} for record in records])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    template = "{% for m in messages %}{{ m.role + '|' + m.content + ('!' if 'name' in m else '') }}{% endfor %}"
    lines = make_examples(tmp_path / "lines", records, chat_template=template)
    job = FinetuneJob([str(tmp_path / "t.parquet")], str(tmp_path / "t"), "ByteTokenizer", TokenizerFiles(), template)
    assert preprocess_examples(job).examples == 6
    for suffix in (".bin", ".idx", ".answers.mask"):
        assert Path(lines + suffix).read_bytes() == Path(job.prefix + suffix).read_bytes()
    pq.write_table(pa.table({"messages": [CHAT["messages"], None], "x": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet, row 2: none of the known keys"):
        preprocess_examples(job)


def test_lone_surrogates_are_replaced_on_request(tmp_path: Path) -> None:
    record = {"prompt": "\ud800", "completion": "a\ude00"}
    prefix = make_examples(tmp_path / "x", [record], lone_surrogates="replace")
    assert texts(prefix)[0][0].decode() == "\ufffda\ufffd|"


def test_system_messages_start_conversations_as_in_megatron_lm() -> None:
    line = b'{"messages": [%s, %s, %s, %s]}' % (
        (b'{"role": "system", "content": "s"}', b'{"role": "user", "content": "u"}') * 2
    )
    assert [len(each.messages) for each in RecordReader()(line)] == [2, 2]
    assert [len(each.messages) for each in RecordReader(splits_at_system=False)(line)] == [4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": ""}', "no answer"),
        ('{"prompt": "a"}', "none of the known keys: give 'prompt' and 'completion'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer|no chat template"),
        ('{"messages": []}', "'messages' is not a list of messages"),
        ('{"messages": [{"role": "assistant"}]}', r"messages\[0\] has neither content nor tool_calls"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\] has no role"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', r"messages\[0\]\.weight is 0.5"),
        (
            '{"messages": [{"role": "assistant", "content": "a", "tool_calls": "x"}]}',
            "tool_calls is not a list of objects",
        ),
        ('{"instruction": "a", "output": "b", "history": "c"}', "'history' is not a list of pairs"),
        ('{"instruction": "a", "output": null}', "output is not a string"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "is from 'alien'; known are human"),
        ('{"prompt": "a", "completion": "\\ud800"}', "lone surrogate"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_are_reported_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    good = write_records(path, [PAIR, PAIR])
    path.write_text(path.read_text() + "\n" + line + "\n", encoding="utf-8")
    job = FinetuneJob([good], str(tmp_path / "x"), "ByteTokenizer", TokenizerFiles(), chat_template=CHATML)
    with pytest.raises(ConfigError, match=rf"data\.jsonl:4: .*(?:{message})"):
        preprocess_examples(job)
    assert not list(tmp_path.glob("x*")), "nothing is left behind"
    skipping = FinetuneJob(
        [good], str(tmp_path / "x"), "ByteTokenizer", TokenizerFiles(), chat_template=CHATML, skip_errors=True
    )
    summary = preprocess_examples(skipping)
    assert (summary.examples, summary.skipped, len(summary.errors)) == (2, 1, 1)


def test_long_examples(tmp_path: Path) -> None:
    records = [PAIR, {"prompt": "a" * 10, "completion": "b" * 10}, {"prompt": "a" * 20, "completion": "b"}]
    with pytest.raises(ConfigError, match=r"x\.jsonl:2: 21 tokens, more than --seq-length 16"):
        make_examples(tmp_path / "x", records, seq_length=16)
    cut = make_examples(tmp_path / "cut", records, seq_length=16, long_examples="truncate")
    assert texts(cut) == [(b"one two|", b"two|"), (b"a" * 10 + b"b" * 6, b"b" * 6)]
    assert (check_mask(cut, "answers").origin["truncated"], check_mask(cut, "answers").origin["dropped"]) == (1, 1)
    assert len(texts(make_examples(tmp_path / "drop", records, seq_length=16, long_examples="drop"))) == 1
    with pytest.raises(ConfigError, match="--long-examples drop needs --seq-length"):
        make_examples(tmp_path / "x", records, long_examples="drop")


@pytest.mark.parametrize("step", ["write_mask", "remove_metadata", "write_metadata"])
def test_a_stopped_job_leaves_no_corpus_without_its_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, step, stop)
    with pytest.raises(KeyboardInterrupt):
        make_examples(tmp_path / "x", [PAIR])
    prefix = str(tmp_path / "x_sft_document")
    assert Path(f"{prefix}.idx").exists() == (step == "write_metadata")
    if step == "write_metadata":
        check_mask(prefix, "answers")
    monkeypatch.undo()
    assert texts(make_examples(tmp_path / "x", [PAIR])) == [(b"one two|", b"two|")]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_records(tmp_path / "x.jsonl", [PAIR, {"prompt": "p", "completion": ""}])
    arguments = ["--input", source, "--output-prefix", str(tmp_path / "x"), "--tokenizer-type", "ByteTokenizer"]
    code, _, errors = run_tool(monkeypatch, capsys, "preprocess_sft", arguments)
    assert code == 2 and "x.jsonl:2: no answer" in errors and "--on-error skip" in errors
    code, output, errors = run_tool(monkeypatch, capsys, "preprocess_sft", [*arguments, "--on-error", "skip"])
    assert code == 0 and "1 examples, 8 tokens, 4 answer tokens (50.0%)" in output and "1 lines skipped" in output
    assert "skipped" in errors
    for wrong, message in (
        (["--append-eod"], "--append-eod"),
        (["--json-keys", "a"], "--json-keys"),
        (["--resume"], "merge their corpora"),
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"], "NullTokenizer encodes no text"),
    ):
        code, _, errors = run_tool(monkeypatch, capsys, "preprocess_sft", [*arguments, *wrong])
        assert code == 2 and message in errors


def test_answers_without_an_end_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_examples(tmp_path / "x", [CHAT, PAIR], chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "the last answers of 1 examples end without a special token" in capsys.readouterr().err
