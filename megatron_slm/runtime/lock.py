"""Directory lock: one active run per directory.

The lock is a file that identifies its owner, who touches it periodically. It expires when the owner is dead: on the
owner's machine when the process has ended, for a requeued Slurm job when the job restarts, and elsewhere after
``SECONDS_TO_EXPIRY`` without a touch. Expiry relies on the clock of the file system only, not on those of two hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_regular, explained_write
from megatron_slm.runtime.launch import SlurmJob, slurm_job
from megatron_slm.runtime.output import print_error
from megatron_slm.runtime.start_times import start_time

LOCK_FILE = ".slm_run.lock"
SECONDS_BETWEEN_TOUCHES = 10.0
SECONDS_TO_EXPIRY = 120.0


@dataclass(frozen=True)
class Owner:
    """Identity of the process that holds a lock."""

    token: str
    host: str
    machine: str  # kernel and process namespace in which ``pid`` is unique
    pid: int
    started: float  # start time of the process, since pids are reused
    job: SlurmJob

    def __str__(self) -> str:
        job = f", Slurm job {self.job.job_id}" if self.job.job_id else ""
        return f"process {self.pid} on {self.host}{job}"


class DirectoryLock:
    """Lock of one directory, which is created if it does not exist.

    Args:
        directory: directory to lock.
        flag: flag that names the directory, for error messages.
    """

    def __init__(self, directory: str | Path, flag: str) -> None:
        self.directory, self.flag = Path(directory), flag
        self.path = self.directory / LOCK_FILE
        self._owner: Owner | None = None
        self._created: list[Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="directory-lock", daemon=True)

    def acquire(self) -> None:
        """Acquire the lock, replacing that of a dead owner.

        Raises:
            ConfigError: another run is active in the directory, or the directory is unwritable.
        """
        owner = _this_process()
        try:
            with explained_write(self.directory, self.flag):
                self._create_directory()
                while not _create(self.path, owner):
                    with contextlib.suppress(FileNotFoundError):  # removed by another process
                        self._replace_expired(owner)
                    if _read_owner(self.path) == owner:
                        break
        except ConfigError:
            self._remove_directory()
            raise
        self._owner = owner
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, and the directory if it was created for the lock and is empty; idempotent."""
        if self._owner is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read_owner(self.path) == self._owner:
                self.path.unlink()
        self._remove_directory()
        self._owner = None

    def _create_directory(self) -> None:
        missing = [self.directory, *self.directory.parents]
        self._created = [directory for directory in missing if not directory.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)

    def _remove_directory(self) -> None:
        """Remove the directories that were created for the lock, unless they are in use."""
        with contextlib.suppress(OSError):
            for directory in self._created:
                directory.rmdir()

    def _replace_expired(self, owner: Owner) -> None:
        """Replace the lock of a dead owner, unless another process does.

        Raises:
            ConfigError: the owner is alive.
            FileNotFoundError: the lock was removed meanwhile.
        """
        expired = self._expired_owner(self.path)
        new = _replacement(self.path)
        if not _create(new, owner):
            self._expired_owner(new)
            new.unlink()
        elif _read_owner(self.path) == expired:
            new.replace(self.path)
        else:
            new.unlink()

    def _expired_owner(self, path: Path) -> Owner | None:
        """Return the dead owner of a lock, None if it is unreadable.

        Raises:
            ConfigError: the owner is alive.
            FileNotFoundError: there is no lock.
        """
        touched = path.stat().st_mtime_ns
        owner = _read_owner(path)
        dead = _is_dead(owner) if owner is not None else None
        if dead is None:
            dead = self._expires(path, touched, owner)
        if not dead:
            raise ConfigError(
                f"{self.flag} {self.directory}: another run is active there ({owner or 'owner unknown'}). Wait for it, "
                f"stop it, or choose another directory. If it is dead, remove {path}."
            )
        return owner

    def _expires(self, path: Path, touched: int, owner: Owner | None) -> bool:
        """Wait until the lock expires or is touched; return whether it expired.

        Raises:
            FileNotFoundError: the lock was removed meanwhile.
        """
        expiry = time.monotonic() + SECONDS_TO_EXPIRY - self._age(touched)
        if expiry > time.monotonic():
            print_error(
                f"{self.flag} {self.directory} is locked by {owner or 'an unknown process'}: waiting up to "
                f"{expiry - time.monotonic():.0f} s for a sign of life"
            )
        while time.monotonic() < expiry:
            time.sleep(min(1.0, SECONDS_BETWEEN_TOUCHES))
            if path.stat().st_mtime_ns != touched:
                return False
        return True

    def _age(self, touched: int) -> float:
        """Return the seconds since the last touch by the clock of the file system."""
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".clock-") as probe:
            return max(0.0, (Path(probe.name).stat().st_mtime_ns - touched) / 1e9)

    def _keep_alive(self) -> None:
        """Touch the lock until it is released; exit if another run has taken it over."""
        while not self._ended.wait(SECONDS_BETWEEN_TOUCHES):
            with contextlib.suppress(OSError):
                owner = _read_owner(self.path)
                if owner is not None and owner != self._owner:
                    print_error(
                        f"error: {self.flag} {self.directory} was taken over by {owner}, because this run gave no "
                        f"sign of life for {SECONDS_TO_EXPIRY:.0f} s. Exiting to protect the directory."
                    )
                    os._exit(ConfigError.exit_code)
                os.utime(self.path)


def _create(path: Path, owner: Owner) -> bool:
    """Create a lock file; return False if it exists."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(asdict(owner)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def locking_job(directory: Path) -> str | None:
    """Return the id of the Slurm job that holds the lock of a directory; None if there is no such lock."""
    owner = _read_owner(directory / LOCK_FILE)
    return owner.job.job_id or None if owner is not None else None


def remove_lock_of_job(directory: Path, job_id: str) -> None:
    """Remove the lock of a Slurm job that has ended, unless another run replaces it."""
    path = directory / LOCK_FILE
    if locking_job(directory) != job_id:
        return
    with explained_write(directory, "--save"):
        if _create(_replacement(path), _this_process()):
            if locking_job(directory) == job_id:
                path.unlink(missing_ok=True)
            _replacement(path).unlink()


def _replacement(path: Path) -> Path:
    """Return the path of the file that replaces an expired lock, which only the process that created it may remove.

    Otherwise, a slow process that has read the expired lock could remove that of a faster one.
    """
    return path.with_name(f"{path.name}.new")


def _this_process() -> Owner:
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=start_time(os.getpid()),
        job=slurm_job(),
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _read_owner(path: Path) -> Owner | None:
    """Return the owner in a lock file; None if the file is missing or unreadable."""
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**{**content, "job": SlurmJob(**content["job"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_dead(owner: Owner) -> bool | None:
    """Return whether the owner's process has ended; None if this cannot be determined on this machine."""
    if owner.machine == _machine():
        return not _is_running(owner)
    return True if slurm_job().is_restart_of(owner.job) else None


def _is_running(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        return start_time(owner.pid) == owner.started
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
