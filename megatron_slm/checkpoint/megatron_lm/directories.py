"""Directory layouts of Megatron-LM, Megatron-Bridge and NeMo checkpoints.

Megatron-LM      latest_checkpointed_iteration.txt, iter_0000100/ or release/
Megatron-Bridge  the same, with latest_train_state.pt and iter_0000100/run_config.yaml
NeMo 2           weights/ and context/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.megatron_lm.common_state import FORMAT_FILE, METADATA_FILE
from megatron_slm.config.checkpoint_files import (
    CONFIG_FILE,
    DATA_FILE,
    MANIFEST_FILE,
    TRACKER,
    parse_step,
    step_directory,
)
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import check_regular

RELEASE = "release"  # a tracker file with this word names the directory of converted weights
BRIDGE_TRACKER = "latest_train_state.pt"
NEMO_WEIGHTS = "weights"


@dataclass(frozen=True)
class Location:
    """Represent the directory of one checkpoint, and whether it has a position in a run."""

    directory: Path
    is_release: bool = False


def locate(path: Path, step: int | None) -> Location | None:
    """Return the checkpoint of another trainer at ``path``, in any format; None if there is none.

    Args:
        path: directory of a run, or of one of its steps.
        step: requested step, or None for the newest.
    """
    found = _locate(path, step)
    return found if found is not None and is_foreign(found.directory) else None


def is_foreign(directory: Path) -> bool:
    """Return whether another trainer wrote the checkpoint in ``directory``."""
    if not directory.is_dir() or any((directory / name).exists() for name in (MANIFEST_FILE, CONFIG_FILE, DATA_FILE)):
        return False
    return is_distributed(directory) or bool(legacy_files(directory)) or (directory / METADATA_FILE).is_file()


def is_distributed(directory: Path) -> bool:
    """Return whether the directory has the files of Megatron-Core's distributed formats."""
    return (directory / FORMAT_FILE).is_file()


def legacy_files(directory: Path) -> list[Path]:
    """Return the directories of Megatron-LM's earlier format, one per model-parallel rank."""
    return sorted(path for path in directory.glob("mp_rank_*") if path.is_dir())


def _locate(path: Path, step: int | None) -> Location | None:
    if step is not None:
        return Location(step_directory(path, step))
    if is_distributed(path) or legacy_files(path):
        return Location(path, is_release=path.name in (RELEASE, NEMO_WEIGHTS))
    if is_distributed(path / NEMO_WEIGHTS):
        return Location(path / NEMO_WEIGHTS, is_release=True)
    newest = _tracked(path)
    if newest == RELEASE:
        return Location(path / RELEASE, is_release=True)
    number = parse_step(newest)
    return Location(step_directory(path, number)) if number is not None else None


def _tracked(path: Path) -> str:
    """Return the content of the tracker file, or the newest step of a run of Megatron-Bridge; empty if unknown."""
    try:
        check_regular(path / TRACKER)
        return (path / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        if not (path / BRIDGE_TRACKER).is_file():
            return ""
        steps = (match[1] for each in path.iterdir() if (match := re.fullmatch(r"iter_([0-9]+)", each.name)))
        return max(steps, key=int, default="")


def refuse_other_formats(directory: Path, flag: str) -> None:
    """Raise ConfigError for formats other than ``torch_dist``, with the command that converts them."""
    if is_distributed(directory):
        return
    if legacy_files(directory):
        kind, convert = f"the format torch of Megatron-LM ({legacy_files(directory)[0].name})", CONVERT
    else:
        kind, convert = "the format torch_dcp or fsdp_dtensor", "Save it as torch_dist with the trainer that wrote it."
    raise ConfigError(f"{flag}: {directory} is in {kind}, and torch_dist is required. {convert}")


CONVERT = (
    "Convert it with Megatron-LM: run pretrain_gpt.py with the flags of its run and --auto-detect-ckpt-format "
    "--ckpt-convert-format torch_dist --ckpt-convert-save DIR, then use DIR/torch_dist."
)
