"""Checks of a node that need neither torch nor a GPU: disks, memory, versions of the software."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import subprocess
import tempfile
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

import megatron_slm
from megatron_slm.runtime.node_check.report import GIB, NodeReport

SECONDS_FOR_NVIDIA_SMI = 30.0
QUERY = "driver_version,ecc.errors.uncorrected.volatile.total"


def check_locally(node: str, save: str | None, shared: tuple[str, str] | None) -> NodeReport:
    """Check disks, memory and versions.

    Args:
        shared: file that the coordinator has written to the run directory, and its content.
    """
    report = NodeReport(node)
    report.versions = read_versions()
    report.free_gb["memory"] = psutil.virtual_memory().available / GIB
    _check_directory(report, "tmp", Path(tempfile.gettempdir()))
    if save is not None:
        _check_directory(report, "save", _existing(Path(save)))
    if shared is not None:
        _check_shared(report, Path(shared[0]), shared[1])
    _ask_nvidia_smi(report)
    return report


def read_versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes, without importing the packages."""
    versions = {"Python": platform.python_version()}
    for package in ("torch", "megatron-core", "transformer-engine"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    root = Path(megatron_slm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return {**versions, "the code of megatron_slm": f"{megatron_slm.__version__}-{digest.hexdigest()[:10]}"}


def _existing(path: Path) -> Path:
    """Return the directory, or the nearest parent that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def _check_directory(report: NodeReport, role: str, directory: Path) -> None:
    flag = "--save" if role == "save" else "temporary files"
    probe = directory / f".node-check-{uuid.uuid4().hex[:8]}"
    try:
        report.free_gb[role] = shutil.disk_usage(directory).free / GIB
        probe.write_bytes(b"node check")
    except OSError as error:
        report.errors.append(f"{flag}: {directory} cannot be written ({error.strerror})")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _check_shared(report: NodeReport, path: Path, content: str) -> None:
    try:
        is_equal = path.read_text(encoding="utf-8") == content
    except OSError as error:
        report.errors.append(f"{path.parent} is not shared: a file of another node cannot be read ({error.strerror})")
        return
    if not is_equal:
        report.errors.append(f"{path.parent} is not shared: a file of another node differs")


def _ask_nvidia_smi(report: NodeReport) -> None:
    """Read driver version and uncorrected memory errors, if the tool exists."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_NVIDIA_SMI, check=True)
    except FileNotFoundError:
        return
    except subprocess.TimeoutExpired:
        report.errors.append(f"nvidia-smi did not answer within {SECONDS_FOR_NVIDIA_SMI:.0f} s")
        return
    except (subprocess.CalledProcessError, OSError) as error:
        text = str(getattr(error, "stdout", "") or error).strip().splitlines()
        report.errors.append(f"nvidia-smi failed: {text[0] if text else error}")
        return
    for index, line in enumerate(shown.stdout.strip().splitlines()):
        driver, _, errors = (part.strip() for part in line.partition(","))
        report.versions["the driver"] = driver
        if errors.isdecimal() and int(errors):
            report.errors.append(f"GPU {index} has {errors} uncorrected memory errors (ECC)")
