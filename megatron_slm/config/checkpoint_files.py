"""Torch-free access to a checkpoint directory: tracker, manifest and configuration.

A checkpoint is a directory in Megatron-Core's distributed format (``torch_dist``) with two additional files:
``config.yaml``, the resolved configuration of the run, and ``manifest.json``, written last, with the size and content
checksum of every file and a checksum of the manifest itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.config.checks import derive
from megatron_slm.config.recipe import read_config
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError, UnusableFileError, read_error
from megatron_slm.runtime.files import check_regular, write_text

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's file with the newest step
CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"  # identities of the corpora, orders of samples
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Description of a complete checkpoint."""

    step: int
    consumed_samples: int
    tokenizer: dict[str, Any]  # name, fingerprint (sha256 of the model file), vocab_size
    layout: dict[str, int]  # tensor, pipeline and data parallel sizes of the run that wrote it
    files: dict[str, int]  # path below the checkpoint's directory -> size in bytes
    checksums: dict[str, str] = field(default_factory=dict)  # by path; empty in checkpoints of version 0.1

    def write(self, directory: Path, checksum: Callable[[str], str]) -> None:
        """Write the manifest with the checksum of its content."""
        content = asdict(self)
        text = json.dumps({**content, "checksum": checksum(_canonical(content))}, indent=1)
        write_text(directory / MANIFEST_FILE, text, "--save")


def read_manifest(directory: Path, flag: str, checksum: Callable[[str], str] | None = None) -> Manifest:
    """Return the manifest of a checkpoint directory.

    Args:
        flag: flag that names the checkpoint, for error messages.
        checksum: function to verify the content with.

    Raises:
        UnusableFileError: the manifest is missing, unreadable or damaged.
    """
    path = directory / MANIFEST_FILE
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = content.pop("checksum", None)
        manifest = Manifest(**content)
    except FileNotFoundError as error:
        raise UnusableFileError(
            f"{flag}: {directory} is not a complete checkpoint ({MANIFEST_FILE}, which is written last, is "
            f"missing). {other_step(flag)}"
        ) from error
    except OSError as error:
        raise read_error(flag, path, error) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableFileError(f"{flag}: {path} is damaged ({error}). {other_step(flag)}") from error
    expected = recorded is not None or bool(manifest.checksums)
    if checksum is not None and expected and recorded != checksum(_canonical(content)):
        raise UnusableFileError(
            f"{flag}: {path} is damaged: its content does not match its checksum. {other_step(flag)}"
        )
    _check_name(directory, manifest.step, flag)
    return manifest


def _check_name(directory: Path, step: int, flag: str) -> None:
    """Raise UnusableFileError if the directory name does not match the step of the checkpoint."""
    named = re.fullmatch(r"iter_([0-9]+)", directory.name)
    if named is not None and int(named[1]) != step:
        raise UnusableFileError(
            f"{flag}: {directory} holds step {step} by its {MANIFEST_FILE}. Rename it to "
            f"{step_directory(directory, step).name}, or choose another step {step_choice(flag)}."
        )


def step_flag(flag: str) -> str:
    """Return the flag that names a step of the checkpoint that ``flag`` names."""
    return "--reference-ckpt-step" if flag == "--reference-load" else "--ckpt-step"


def step_choice(flag: str) -> str:
    """Return how to choose another step of a checkpoint that ``flag`` names, which may name several."""
    if flag in ("--reference-load", "--pretrained-checkpoint"):
        return "by giving its iter_* directory"
    return "with --ckpt-step"


def other_step(flag: str = "--load") -> str:
    """Return the remedy for a damaged checkpoint that ``flag`` names."""
    return f"Copy the checkpoint again, or choose another step {step_choice(flag)}."


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def step_directory(root: Path, step: int) -> Path:
    """Return the directory of one step, in Megatron-LM's naming."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """Return the step of the tracker file below ``root``, or None if there is no such file.

    Raises:
        UnusableFileError: the file is unreadable, or contains no number.
    """
    tracker = root / TRACKER
    try:
        check_regular(tracker)
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnusableFileError(f"{tracker} cannot be read ({error.strerror}). Check its permissions.") from error
    if (step := parse_step(text)) is None:
        raise UnusableFileError(
            f"{tracker} must contain the number of the newest step, not {text[:40]!r}. "
            "Write the number of a complete iter_* directory into it."
        )
    return step


def parse_step(text: str) -> int | None:
    """Return the step of a tracker file's content, or None if it is not a number in the range of steps."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def saved_config(directory: Path) -> RunConfig:
    """Return the resolved configuration of the run that wrote the checkpoint.

    Raises:
        UnusableFileError: the file is missing or damaged.
    """
    try:
        return derive(read_config(directory / CONFIG_FILE))
    except ConfigError as error:
        raise UnusableFileError(f"the checkpoint {directory} is damaged: {error} {other_step()}") from error


def file_sizes(directory: Path) -> dict[str, int]:
    """Return the size in bytes of every file below ``directory``, in a fixed order."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def check_sizes(directory: Path, manifest: Manifest, flag: str) -> None:
    """Raise UnusableFileError if a file that the manifest names is missing or has another size."""
    try:
        present = file_sizes(directory)
    except OSError as error:
        raise read_error(flag, directory, error) from error
    for name, size in manifest.files.items():
        if present.get(name) != size:
            found = "is missing" if name not in present else f"has {present[name]} bytes"
            raise UnusableFileError(
                f"{flag}: the checkpoint {directory} is damaged: {name} {found}, not the original {size} bytes. "
                f"{other_step(flag)}"
            )
