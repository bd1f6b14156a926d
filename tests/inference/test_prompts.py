"""Test the files of the generation command: prompts are read with places, and texts are written once."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.inference.generation import Generation
from megatron_slm.inference.output_file import OutputFile, check_output, job_key, partial_path
from megatron_slm.inference.prompts import Prompt, read_prompts
from megatron_slm.inference.sampling import Decoding
from megatron_slm.inference.texts import read_texts
from megatron_slm.runtime.errors import ConfigError


def test_prompts_keep_their_line_numbers_and_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "id": 7}\r\n\n  \n{"prompt": ""}')
    assert read_prompts(str(path)) == [
        Prompt("a", f"{path}:1", {"prompt": "a", "id": 7}),
        Prompt("", f"{path}:4", {"prompt": ""}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"promt": "a", "id": 1}', "the key 'prompt' is missing (keys: 'promt', 'id')"),
        (b'{"prompt": ["a"]}', "the value of 'prompt' is not a string"),
        (b'"a"', 'not a JSON object; write {"prompt": "text"}'),
        (b'{"prompt": "a"', "not JSON ("),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "a lone surrogate"),
        (b"[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_unreadable_lines_are_refused_with_their_place(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(ConfigError) as error:
        read_prompts(str(path))
    assert f"--input: {path}:3: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ufeffa".encode("utf-16-le"), "is UTF-16 text, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8"),
        ("\ufeffa".encode("utf-32-be"), "is UTF-32 text"),
        (gzip.compress(b"a"), "is a .gz file by its content. Unpack it"),
    ],
)
def test_other_encodings_and_packed_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    for key in (None, "text"):
        with pytest.raises(ConfigError, match=re.escape(f"--input {tmp_path / 'text'} {message}")):
            read_texts(str(tmp_path / "text"), key)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ConfigError, match="not a regular file"):
        read_prompts(str(tmp_path))


def test_prompts_of_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO('{"prompt": " \u00fc"}\n'.encode())))
    assert read_prompts("-") == [Prompt(" \u00fc", "-:1", {"prompt": " \u00fc"})]
    (tmp_path / "out.jsonl").touch()
    check_output(str(tmp_path / "out.jsonl"), "-")
    for empty in (io.TextIOWrapper(io.BytesIO()), None):
        monkeypatch.setattr(sys, "stdin", empty)
        with pytest.raises(ConfigError, match="--input - holds no prompt"):
            read_prompts("-")


PROMPTS = [Prompt(text, f"f:{number}", {"prompt": text, "id": number}) for number, text in enumerate("abc")]
TEXTS = [Generation([], f"text \u00fc {number}\n") for number in range(3)]
KEY = job_key("model", Decoding(), PROMPTS)


def written(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_interrupted_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    OutputFile(str(path), KEY).append(PROMPTS[:2], TEXTS[:2])
    with partial_path(str(path)).open("ab") as file:
        file.write(b'{"prompt": "c", "te')  # a line cut by a kill
    check_output(str(path))
    file = OutputFile(str(path), KEY)
    assert file.finished == 2 and not path.exists()
    file.append(PROMPTS[2:], TEXTS[2:])
    file.publish()
    assert written(path) == [generation.text for generation in TEXTS]
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[1]) == {
        "prompt": "b",
        "id": 1,
        "text": TEXTS[1].text,
    }
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]


def test_two_jobs_do_not_write_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "out.jsonl")
    OutputFile(path, KEY).append(PROMPTS, TEXTS)
    before = partial_path(path).read_bytes()
    hold = f"import fcntl, sys; f = open({str(partial_path(path))!r}, 'ab'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold += "; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="--output: another process is writing there"):
            OutputFile(path, job_key("other", Decoding(), PROMPTS))
        holder.communicate(b"")
    assert partial_path(path).read_bytes() == before
    assert OutputFile(path, KEY).finished == 3


def test_other_settings_start_again(tmp_path: Path) -> None:
    path = str(tmp_path / "out.jsonl")
    OutputFile(path, KEY).append(PROMPTS, TEXTS)
    for key in (job_key("model", Decoding(seed=1), PROMPTS), job_key("other", Decoding(), PROMPTS)):
        assert OutputFile(path, key).finished == 0


def test_lines_are_utf_8_whatever_their_other_keys_hold(tmp_path: Path) -> None:
    file = OutputFile(str(tmp_path / "out.jsonl"), KEY)
    file.append([Prompt("\u00fc", "", {"prompt": "\u00fc", "id": "\ud83d"}), PROMPTS[0]], TEXTS[:2])
    file.publish()
    first, second = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")[:2]
    assert json.loads(first) == {"prompt": "\u00fc", "id": "\ud83d", "text": TEXTS[0].text}
    assert "\u00fc" in second


def test_the_input_is_not_replaced(tmp_path: Path) -> None:
    source, other = tmp_path / "texts.jsonl", tmp_path / "other.jsonl"
    source.write_text('{"prompt": "a", "text": "b"}\n')
    other.symlink_to(source)
    check_output(str(source), __file__)
    for path in (source, other):
        with pytest.raises(ConfigError, match=f"--output {path} is the file of --input, which is not replaced"):
            check_output(str(path), str(source))


def test_the_file_of_a_job_that_was_killed_at_its_start_is_continued(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").touch()
    check_output(str(tmp_path / "out.jsonl"))


@pytest.mark.parametrize(
    "content",
    ['{"prompt": "a"}\n', '["prompt", "text", "generate_text"]', "[" * 100_000],
    ids=["line", "list", "depth"],
)
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"--output .*{name} exists and was not written by megatron_slm"):
        check_output(str(tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match=r"the directory .* does not exist"):
        check_output(str(tmp_path / "missing" / "out.jsonl"))
