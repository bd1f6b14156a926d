"""Resuming: killed jobs continue and write the same bytes, and a full disk leaves existing corpora intact."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_documents import lines, write_table

from megatron_slm.preprocessing import documents
from megatron_slm.preprocessing import preprocess as module
from megatron_slm.preprocessing.preprocess import Job, Summary, preprocess
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import TokenizerFiles

TEXTS = [f"document {number} " + "abc " * (number % 50) for number in range(120)]
BAD = b'{"text": 5}\n\n'


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 3000)


def write_inputs(directory: Path, times: int = 1) -> list[str]:
    """Write plain, compressed, truncated, table and text inputs of several blocks, with unreadable lines."""
    texts = TEXTS * times
    (directory / "a.jsonl").write_bytes(lines(texts[:60]) + BAD + lines(texts[60:]))
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts) + BAD)[:-9])
    write_table(directory / "c.parquet", [*texts, None])
    (directory / "d.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return [str(directory / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]


def make_job(files: list[str], prefix: Path, **more: Any) -> Job:
    settings: dict[str, Any] = {"append_eod": True, "skip_errors": True, **more}
    return Job(files, ["text"], str(prefix), "ByteTokenizer", TokenizerFiles(), **settings)


def corpus_bytes(job: Job) -> list[bytes]:
    return [Path(f"{job.prefix(key)}{end}").read_bytes() for key in job.keys for end in (".bin", ".idx")]


def counted(summary: Summary) -> tuple[int, ...]:
    return (*summary.counts(), summary.tokens)


class Killed(BaseException):
    """Simulate kill -9 within a process: it is not handled, and no cleanup runs."""


class Countdown:
    """Raises :class:`Killed` at the n-th change of a file; a write is torn in the middle."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed

    def is_now(self) -> bool:
        return self.left == 1


class TornFile:
    def __init__(self, file: Any, countdown: Countdown) -> None:
        self.file, self.countdown = file, countdown

    def write(self, data: bytes) -> int:
        if self.countdown.is_now():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
        self.countdown()
        return self.file.write(data)  # type: ignore[no-any-return]

    def truncate(self, size: int) -> None:
        self.countdown()
        self.file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.file)

    def __enter__(self) -> TornFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def run_until(job: Job, change: int) -> Summary | None:
    """Run a job that dies at its n-th change of a file; None if it did."""
    countdown = Countdown(change)
    opened, replaced, unlinked, os_replaced = Path.open, Path.replace, Path.unlink, os.replace

    def open_(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = opened(path, mode, *more, **named)
        return file if mode in ("r", "rb") or "encoding" in named else TornFile(file, countdown)

    def before(change: Any) -> Any:
        def changed(*given: Any, **named: Any) -> Any:
            countdown()
            return change(*given, **named)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_)
        patch.setattr(Path, "replace", before(replaced))
        patch.setattr(Path, "unlink", before(unlinked))
        patch.setattr(os, "replace", before(os_replaced))
        try:
            return preprocess(job)
        except Killed:
            return None


def test_job_killed_at_every_file_operation_resumes(tmp_path: Path) -> None:
    files = write_inputs(tmp_path)
    expected_job = make_job(files, tmp_path / "expected")
    expected = preprocess(expected_job)
    assert expected.skipped == 4 and expected.documents > 400
    change = 0
    while True:  # every change costs a run: the few first, then some of the many blocks, then every one of the end
        change += 1 if change < 30 else 7
        directory = tmp_path / f"out{change}"
        job = make_job(files, directory / "out", resume=True)
        if run_until(job, change) is not None:
            break
        summary = preprocess(job)
        assert counted(summary) == counted(expected), change
        assert corpus_bytes(job) == corpus_bytes(expected_job), change
        assert sorted(path.suffix for path in directory.iterdir()) == [".bin", ".idx", ".json"], change
        shutil.rmtree(directory)
    assert change > 100


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.lists(st.integers(1, 200), max_size=4))
def test_repeatedly_killed_job_resumes(tmp_path: Path, changes: list[int]) -> None:
    files = write_inputs(tmp_path)
    expected = make_job(files, tmp_path / "expected")
    preprocess(expected)
    job = make_job(files, tmp_path / "out", resume=True)
    for change in changes:
        run_until(job, change)
    preprocess(job)
    assert corpus_bytes(job) == corpus_bytes(expected)
    for path in tmp_path.glob("out*"):
        path.unlink()


def test_kill_during_publication_leaves_a_complete_corpus(tmp_path: Path) -> None:
    """Either the earlier or the new corpus exists under the name at any moment."""
    (tmp_path / "in.jsonl").write_bytes(lines(TEXTS[:5]))
    (tmp_path / "old.jsonl").write_bytes(lines(["old"]))
    job = make_job([str(tmp_path / "in.jsonl")], tmp_path / "out", resume=True)
    expected = make_job([str(tmp_path / "in.jsonl")], tmp_path / "expected")
    preprocess(expected)
    for change in range(1, 100):
        preprocess(make_job([str(tmp_path / "old.jsonl")], tmp_path / "out"))
        finished = run_until(job, change)
        if finished is None:
            preprocess(job)
        assert corpus_bytes(job) == corpus_bytes(expected), change
        if finished is not None:
            break
    assert 10 < change < 99


def test_finished_job_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(write_inputs(tmp_path), tmp_path / "out", resume=True)
    first = preprocess(job)
    monkeypatch.setattr(module, "_write_blocks", None)
    again = preprocess(job)
    assert counted(again) == counted(first) and again.resumed == first.documents


def test_resume_with_other_settings_is_rejected(tmp_path: Path) -> None:
    files = write_inputs(tmp_path)
    job = make_job(files, tmp_path / "out", resume=True)
    assert run_until(job, 60) is None
    for other, message in (
        (replace(job, append_eod=False), "had --append-eod True, but this one has False"),
        (
            replace(job, tokenizer_files=TokenizerFiles(eod_id=7)),
            "had a tokenizer with the end-of-document id 256, but this one has 7",
        ),
        (replace(job, lone_surrogates="replace"), "had --lone-surrogates error, but this one has replace"),
        (replace(job, text_document="file"), "had --text-document paragraph, but this one has file"),
        (
            replace(job, tokenizer_type="NullTokenizer", tokenizer_files=TokenizerFiles(vocab_size=9)),
            "--tokenizer-type ByteTokenizer, but this one has NullTokenizer",
        ),
        (replace(job, files=files[:-1]), r"--input .*d.txt \(.*but this one has nothing"),
        (replace(job, files=[files[1], files[0], *files[2:]]), "--input .*a.jsonl .*but this one has .*b.jsonl.gz"),
    ):
        with pytest.raises(ConfigError, match=message):
            preprocess(other)
    with Path(files[3]).open("a") as file:
        file.write("more")
    with pytest.raises(ConfigError, match=r"--resume: the stopped job had --input .*d.txt .*omit --resume"):
        preprocess(job)
    assert preprocess(replace(job, resume=False)).documents, "without --resume it starts from scratch"


def test_error_keeps_temporary_files_only_with_resume(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(TEXTS) + BAD + lines(TEXTS))
    job = make_job([str(source)], tmp_path / "out", skip_errors=False, resume=True)
    with pytest.raises(ConfigError, match=r"in.jsonl:121: the value of 'text' is not a string"):
        preprocess(job)
    skipping = replace(job, skip_errors=True)
    summary = preprocess(skipping)
    assert 0 < summary.resumed <= 120 and summary.documents == 240 and (summary.skipped, summary.blank_lines) == (1, 1)
    expected = make_job([str(source)], tmp_path / "expected")
    preprocess(expected)
    assert corpus_bytes(skipping) == corpus_bytes(expected)
    with pytest.raises(ConfigError):
        preprocess(replace(job, output_prefix=str(tmp_path / "other"), resume=False))
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize(
    ("text", "count", "block", "limit", "first"),
    [
        ("x", 40, 10, 100, "journal"),  # its first line
        ("x", 40, 10, 1_500, "journal"),
        ("x" * 300, 400, 3_000, 30_000, ".bin"),
        ("", 4_000, 3_000, 15_000, ".sequences"),
        ("xx", 4_000, 3_000, 50_000, ".idx"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_full_disk_is_reported_and_keeps_the_existing_corpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    count: int,
    block: int,
    limit: int,
    first: str,
    resume: bool,
) -> None:
    """Files of more than ``limit`` bytes cannot be written, and ``first`` is the first to reach it."""
    monkeypatch.setattr(documents, "BLOCK", block)
    (tmp_path / "old.jsonl").write_bytes(lines(["old"]))
    (tmp_path / "in.jsonl").write_bytes(lines([text] * count))
    job = make_job([str(tmp_path / "in.jsonl")], tmp_path / "out", resume=resume)
    preprocess(replace(job, files=[str(tmp_path / "old.jsonl")], resume=False))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, earlier[1]))
    try:
        with pytest.raises(ConfigError, match=r"--output-prefix .*cannot be written: File too large. Free space"):
            preprocess(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    sizes = {path.name.partition("document")[2]: path.stat().st_size for path in tmp_path.glob("out*")}
    if resume:
        assert [name for name, size in sizes.items() if size == limit and name.endswith(first)], sizes
    after = {path.name: path.read_bytes() for path in tmp_path.glob("out*") if not resume or path.name in before}
    assert after == before
    if resume:
        preprocess(job)
        expected = replace(job, output_prefix=str(tmp_path / "expected"))
        preprocess(expected)
        assert corpus_bytes(job) == corpus_bytes(expected)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".journal"])
@pytest.mark.parametrize("resume", [False, True])
def test_unrelated_file_is_not_replaced(tmp_path: Path, suffix: str, resume: bool) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(TEXTS))
    foreign = tmp_path / f"out_text_document{suffix}"
    foreign.write_bytes(b"PK weights")
    with pytest.raises(ConfigError, match=f"--output-prefix .*{suffix} exists and was not written by megatron_slm"):
        preprocess(make_job([str(tmp_path / "in.jsonl")], tmp_path / "out", resume=resume))
    assert foreign.read_bytes() == b"PK weights"


def test_concurrent_jobs_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines(TEXTS))
    job = make_job([str(tmp_path / "in.jsonl")], tmp_path / "out")
    hold = f"""
import fcntl, sys
file = open({str(tmp_path / "out_text_document.journal")!r}, "a+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process is writing there"):
            preprocess(job)
        other.communicate(b"")
    preprocess(job)


RUN = """
import os, runpy, sys, time
import megatron_slm.preprocessing.documents as documents, megatron_slm.preprocessing.preprocess as preprocess
documents.BLOCK = 3000
build_engine = preprocess.build_engine
def build_slow_engine(*arguments):
    engine, reason = build_engine(*arguments)
    encode, seconds = engine.encode, float(os.environ["SECONDS"])
    engine.encode = lambda texts: time.sleep(seconds * len(texts)) or encode(texts)
    return engine, reason
preprocess.build_engine = build_slow_engine
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tool(files: list[str], prefix: Path) -> list[str]:
    """Return the command with two workers and small blocks; SECONDS in the environment delays each document."""
    path = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    command = [sys.executable, "-c", RUN, str(path), "--input", *files, "--tokenizer-type", "ByteTokenizer"]
    return [*command, "--append-eod", "--on-error", "skip", "--output-prefix", str(prefix), "--workers", "2"]


def _heeds_ctrl_c() -> None:
    """A job that a shell runs in the background inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_completed_blocks(tmp_path: Path) -> None:
    job = make_job(write_inputs(tmp_path), tmp_path / "out", resume=True)
    with subprocess.Popen(
        tool(list(job.files), tmp_path / "out"),
        env={**os.environ, "SECONDS": "0.02"},
        stderr=subprocess.PIPE,
        preexec_fn=_heeds_ctrl_c,
    ) as process:
        journal = tmp_path / "out_text_document.journal"
        while process.poll() is None and not (journal.exists() and len(journal.read_bytes().splitlines()) > 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130 and b"--resume to continue" in errors and b"Traceback" not in errors
    expected = make_job(list(job.files), tmp_path / "expected")
    preprocess(expected)
    assert preprocess(job).resumed and corpus_bytes(job) == corpus_bytes(expected)


@pytest.mark.kills
def test_random_kills(tmp_path: Path) -> None:
    """kill -9 of the real command with two workers at random moments; no worker outlives it."""
    rng = random.Random(4)
    files = write_inputs(tmp_path, times=20)
    command = [*tool(files, tmp_path / "out"), "--resume"]
    slow = {**os.environ, "SECONDS": "0.004"}
    journal = tmp_path / "out_text_document.journal"
    kills, records = 0, []
    while kills < 6:
        process = subprocess.Popen(command, env=slow, stderr=subprocess.DEVNULL)
        size = journal.stat().st_size if journal.exists() else 0
        while kills % 2 and process.poll() is None and (not journal.exists() or journal.stat().st_size <= size):
            time.sleep(0.005)  # in every other run it makes progress; in the others it may not have started
        time.sleep(rng.uniform(0, 0.5))
        workers = psutil.Process(process.pid).children()
        assert process.poll() is None, "it ended before its last kill: make it slower"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        assert not psutil.wait_procs(workers, timeout=10)[1], "a worker outlived its job"
        records.append(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
    assert records[-1] > records[0], f"the job made no headway: {records}"
    quick = subprocess.run(command, env={**os.environ, "SECONDS": "0"}, capture_output=True, text=True, check=False)
    assert quick.returncode == 0, quick.stderr
    expected = make_job(files, tmp_path / "expected")
    summary = preprocess(expected)
    assert corpus_bytes(make_job(files, tmp_path / "out")) == corpus_bytes(expected)
    record = json.loads((tmp_path / "out_text_document.corpus.json").read_text(encoding="utf-8"))
    assert (record["documents"], record["tokens"], record["skipped"]) == (
        summary.documents,
        summary.tokens,
        summary.skipped,
    )
