"""Choose a step of a --save directory, by its tracker file and the manifests of its checkpoints; torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.checkpoint_files import MANIFEST_FILE, TRACKER, latest_step, step_choice, step_flag
from megatron_slm.runtime.errors import ConfigError, UnusableFileError, read_error

REMEDY = "Give the --save directory of an earlier run, or the directory of a published model."
STEP_DIRECTORY = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,})")


@dataclass(frozen=True)
class StepChoice:
    """Represent the newest step of a directory, and the steps to use if it is damaged."""

    step: int
    alternatives: tuple[int, ...] = ()  # other complete steps, best first
    note: str = ""  # reason, if this is not the step of the tracker file


def step_directories(root: Path, flag: str = "--save") -> dict[int, Path]:
    """Return the checkpoint directories below ``root`` by step, complete or not.

    Raises:
        ConfigError: ``root`` is unreadable; ``flag`` names it.
    """
    try:
        if not root.is_dir():
            return {}
        found = ((STEP_DIRECTORY.fullmatch(path.name), path) for path in root.iterdir())
        return {int(match.group(1)): path for match, path in sorted(found, key=str) if match and path.is_dir()}
    except OSError as error:
        raise read_error(flag, error.filename or root, error) from error


def choose_step(root: Path, flag: str) -> StepChoice | None:
    """Return the newest step and its alternatives, or None if ``root`` holds no checkpoint.

    The tracker file decides, so that a run can be continued from an earlier step. A newer complete step is preferred
    only if it was written after the tracker file, as by a run that was killed between the two writes.

    Raises:
        ConfigError: the step of the tracker file does not exist, or no existing step is known to be complete.
    """
    steps = step_directories(root, flag)
    complete = [step for step in sorted(steps, reverse=True) if _is_file(steps[step] / MANIFEST_FILE)]
    tracked, problem = _tracked_step(root, has_alternative=bool(complete))
    if tracked is None:
        if complete:
            return StepChoice(complete[0], tuple(complete[1:]), f"{problem}; this is the newest complete step")
        if not steps:
            return None
        raise ConfigError(
            f"{flag} {root}: {problem}, and no iter_* directory has a {MANIFEST_FILE}, so none is known "
            "to be complete. Write the number of a complete step into the file, or choose one with --ckpt-step."
        )
    if tracked not in steps and not complete:
        raise ConfigError(
            f"{flag} {root}: step {tracked} (from {root / TRACKER}) does not exist. {_listed(steps, flag)}"
        )
    return _order(root, steps, complete, tracked)


def _order(root: Path, steps: dict[int, Path], complete: list[int], tracked: int) -> StepChoice:
    """Return the choice if the tracker file names a step: newer, this, older and abandoned steps, in this order."""
    written = (root / TRACKER).stat().st_mtime_ns
    newer = [step for step in complete if step > tracked and _written_after(steps[step] / MANIFEST_FILE, written)]
    older = [step for step in complete if step < tracked]
    abandoned = [step for step in complete if step > tracked and step not in newer]
    present = [tracked] if tracked in steps else []
    first, *others = [*newer, *present, *older, *abandoned]
    note = ""
    if not present:
        note = f"step {tracked} of {TRACKER} does not exist; this is the newest complete step"
    elif newer:
        note = f"{TRACKER} names step {tracked}, and this step was completed after it was written"
    return StepChoice(first, tuple(others), note)


def locate_checkpoint(path: str, step: int | None, flag: str) -> Path:
    """Return the checkpoint directory of ``step``, or of the tracker file's step, without checking its files.

    Args:
        path: directory with a tracker file, or an ``iter_*`` directory.
        step: requested step; None for the newest.
        flag: flag that names ``path``, for error messages.

    Raises:
        ConfigError: there is no checkpoint.
    """
    root = Path(path)
    if not root.exists():
        raise ConfigError(f"{flag} {path}: there is no such directory. {REMEDY}")
    if step is None and (root / MANIFEST_FILE).is_file():
        return root
    steps = step_directories(root, flag)
    found = latest_step(root) if step is None else step
    if found is None and not steps:
        raise ConfigError(f"{flag} {path}: not a checkpoint (neither {TRACKER} nor {MANIFEST_FILE} is there). {REMEDY}")
    if found is None:
        raise ConfigError(f"{flag} {path}: {TRACKER}, which names the newest step, is missing. {_listed(steps, flag)}")
    if found not in steps:
        source = step_flag(flag) if step is not None else f"from {root / TRACKER}"
        raise UnusableFileError(f"{flag} {path}: step {found} ({source}) does not exist. {_listed(steps, flag)}")
    return steps[found]


def _listed(steps: dict[int, Path], flag: str) -> str:
    """Return the existing steps and the remedy, for error messages."""
    existing = ", ".join(map(str, steps)) or "none"
    return f"Existing steps: {existing}. Choose one {step_choice(flag)}, or write its number into {TRACKER}."


def _tracked_step(root: Path, *, has_alternative: bool) -> tuple[int | None, str]:
    """Return the step of the tracker file, or the reason if there is none.

    Raises:
        ConfigError: the file is damaged or unreadable, and there is no complete checkpoint.
    """
    try:
        step = latest_step(root)
    except UnusableFileError:
        if not has_alternative:
            raise
        return None, f"{TRACKER} is damaged"
    return step, "" if step is not None else f"{TRACKER} is missing"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _written_after(path: Path, time_ns: int) -> bool:
    try:
        return path.stat().st_mtime_ns > time_ns
    except OSError:
        return False
