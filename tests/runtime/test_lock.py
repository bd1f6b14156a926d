"""One active run per directory; locks of dead processes expire."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_slm.runtime import lock as locks
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.launch import SlurmJob
from megatron_slm.runtime.lock import LOCK_FILE, DirectoryLock, Owner

HOLDER = """
import sys, time
from megatron_slm.runtime.lock import DirectoryLock
DirectoryLock(sys.argv[1], "--save").acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BETWEEN_TOUCHES", 0.05), ("TO_EXPIRY", 0.6)):
        monkeypatch.setattr(locks, f"SECONDS_{name}", seconds)


@pytest.fixture(autouse=True)
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail if a lock of this process was taken over, instead of ending the process."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    yield
    assert not codes


def write_owner(directory: Path, **changes: object) -> Owner:
    """Write the lock of this process with ``changes``."""
    owner = replace(locks._this_process(), **changes)  # type: ignore[arg-type]
    directory.mkdir(exist_ok=True)
    (directory / LOCK_FILE).write_text(json.dumps(asdict(owner)))
    return owner


def acquire_and_release(directory: Path) -> None:
    lock = DirectoryLock(directory, "--save")
    lock.acquire()
    lock.release()


def test_second_run_is_refused_while_the_first_is_active(tmp_path: Path) -> None:
    first = DirectoryLock(tmp_path / "run", "--save")
    first.acquire()
    with pytest.raises(ConfigError, match=f"--save .*run: another run is active there .process {os.getpid()} on "):
        DirectoryLock(tmp_path / "run", "--save").acquire()
    first.release()
    acquire_and_release(tmp_path / "run")


def test_release_leaves_nothing_behind(tmp_path: Path) -> None:
    acquire_and_release(tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    acquire_and_release(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_lock_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, directories can often still be created."""
    (tmp_path / "there").mkdir()

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(ConfigError, match=r"--save .*run cannot be written: No space left on device"):
        DirectoryLock(tmp_path / "there" / "new" / "run", "--save").acquire()
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    """This includes a zombie process, whose parent has not read its exit code."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid}"):
        DirectoryLock(tmp_path, "--save").acquire()
    holder.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    try:
        acquire_and_release(tmp_path)
    finally:
        holder.wait()


def test_reused_process_id_is_not_the_owner(tmp_path: Path) -> None:
    write_owner(tmp_path, started=1.0)
    acquire_and_release(tmp_path)


def test_owner_is_alive_after_a_change_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DirectoryLock(tmp_path, "--save")
    first.acquire()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e9)
    with pytest.raises(ConfigError, match="another run is active there"):
        DirectoryLock(tmp_path, "--save").acquire()
    first.release()


def test_owner_on_another_machine_is_alive_while_it_touches_the_lock(tmp_path: Path) -> None:
    write_owner(tmp_path, machine="another", host="node7")
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on node7"):
            DirectoryLock(tmp_path, "--save").acquire()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("age", [0, 3600])
def test_owner_on_another_machine_expires(tmp_path: Path, capsys: pytest.CaptureFixture[str], age: int) -> None:
    write_owner(tmp_path, machine="another", host="node7")
    past = time.time() - age
    os.utime(tmp_path / LOCK_FILE, (past, past))
    began = time.monotonic()
    acquire_and_release(tmp_path)
    assert ("waiting up to" in capsys.readouterr().err) == (age == 0)
    assert (time.monotonic() - began < 0.5) == (age > 0)


def test_requeued_job_takes_the_lock_of_its_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier start may have run on another node, whose processes are not visible."""
    write_owner(tmp_path, machine="another", job=SlurmJob("77", 0))
    monkeypatch.setattr(locks, "SECONDS_TO_EXPIRY", 1000.0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    acquire_and_release(tmp_path)


def test_unreadable_lock_expires(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("")
    acquire_and_release(tmp_path)


def test_a_named_pipe_in_the_place_of_a_lock_expires(tmp_path: Path) -> None:
    """Reading it would wait for a writer."""
    os.mkfifo(tmp_path / LOCK_FILE)
    acquire_and_release(tmp_path)


def test_one_of_several_takes_an_expired_lock(tmp_path: Path) -> None:
    write_owner(tmp_path, started=1.0)
    contenders = [DirectoryLock(tmp_path, "--save") for _ in range(8)]
    taken: list[DirectoryLock] = []

    def contend(lock: DirectoryLock) -> None:
        try:
            lock.acquire()
        except ConfigError:
            return
        taken.append(lock)

    threads = [threading.Thread(target=contend, args=(lock,)) for lock in contenders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].release()


@pytest.mark.parametrize("reads", range(1, 5))
def test_a_slow_process_leaves_the_lock_of_a_faster_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """The faster one tries to take the expired lock after the slow one has read lock files ``reads`` times."""
    write_owner(tmp_path, started=1.0)
    slow, fast = DirectoryLock(tmp_path, "--save"), DirectoryLock(tmp_path, "--save")
    acquired: list[DirectoryLock] = []
    read, remaining = locks._read_owner, iter(range(reads - 1, -1, -1))

    def acquire(lock: DirectoryLock) -> None:
        with contextlib.suppress(ConfigError):
            lock.acquire()
            acquired.append(lock)

    def read_slowly(path: Path) -> Owner | None:
        owner = read(path)
        if next(remaining, None) == 0:
            acquire(fast)
        return owner

    monkeypatch.setattr(locks, "_read_owner", read_slowly)
    acquire(slow)
    time.sleep(3 * locks.SECONDS_BETWEEN_TOUCHES)
    (owner,) = acquired
    assert read(tmp_path / LOCK_FILE) == owner._owner
    owner.release()
    assert not list(tmp_path.iterdir())


def test_a_process_that_died_while_it_replaced_a_lock(tmp_path: Path) -> None:
    write_owner(tmp_path, started=1.0)
    (tmp_path / LOCK_FILE).rename(tmp_path / f"{LOCK_FILE}.new")
    write_owner(tmp_path, started=2.0)
    acquire_and_release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lock_of_an_ended_job_is_removed_unless_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_owner(tmp_path, started=1.0, job=SlurmJob("77", 0))
    locks.remove_lock_of_job(tmp_path, "78")
    assert locks.locking_job(tmp_path) == "77"
    locks.remove_lock_of_job(tmp_path, "77")
    assert not list(tmp_path.iterdir())
    write_owner(tmp_path, started=1.0, job=SlurmJob("77", 0))
    lock, find = DirectoryLock(tmp_path, "--save"), locks.locking_job

    def find_and_wait(directory: Path) -> str | None:
        job_id = find(directory)
        if lock._owner is None:
            lock.acquire()
        return job_id

    monkeypatch.setattr(locks, "locking_job", find_and_wait)
    locks.remove_lock_of_job(tmp_path, "77")
    assert locks._read_owner(tmp_path / LOCK_FILE) == lock._owner
    lock.release()
    assert not list(tmp_path.iterdir())


def test_run_whose_lock_was_taken_over_ends(tmp_path: Path) -> None:
    program = HOLDER.replace(
        "DirectoryLock(sys",
        "import megatron_slm.runtime.lock as l\nl.SECONDS_BETWEEN_TOUCHES = 0.1\nDirectoryLock(sys",
        1,
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    write_owner(tmp_path, token="another")
    _, errors = holder.communicate(timeout=30)
    assert holder.returncode == 2 and "was taken over by process" in errors
