"""Data record of a run in its checkpoints, and detection of changed corpora on resume."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.checkpoint.source import CheckpointSource
from megatron_slm.config.checkpoint_files import DATA_FILE
from megatron_slm.config.schema import RunConfig
from megatron_slm.runtime.errors import ConfigError, UnusableFileError
from megatron_slm.runtime.files import write_text
from megatron_slm.training.run_length import START, Milestone, RunLength
from megatron_slm.training.sample_orders import Orders, SampleOrder

ACCEPT = "--slm-accept-changed-corpora"


@dataclass(frozen=True)
class DataRecord:
    """Represent the data that a run has read."""

    corpora: dict[str, str] = field(default_factory=dict)  # identities by prefix
    milestones: tuple[Milestone, ...] = START  # start of the run and its resumes
    orders: Orders = ()  # sample orders; empty in checkpoints of an earlier release
    reference: str | None = None  # identity of the reference model; None if absent or unknown

    def write(self, directory: Path) -> None:
        """Write the record into a checkpoint directory."""
        write_text(directory / DATA_FILE, json.dumps(asdict(self), indent=1) + "\n", "--save")

    @staticmethod
    def read(directory: Path) -> DataRecord:
        """Read the record of a checkpoint, or return an empty one if an earlier release wrote none.

        Raises:
            UnusableFileError: the file is unreadable.
        """
        path = directory / DATA_FILE
        if not path.exists():
            return DataRecord()
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            milestones = tuple((int(step), int(samples)) for step, samples in content["milestones"])
            orders = tuple(_read_order(order) for order in content.get("orders", ()))
            return DataRecord(dict(content["corpora"]), milestones, orders, content.get("reference"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnusableFileError(f"--load: {path} cannot be read: {error}. Choose another step.") from error


@dataclass(frozen=True)
class SavedRun:
    """Represent the run that saved a checkpoint, up to its step."""

    directory: Path
    config: RunConfig
    corpora: dict[str, str]  # identities by prefix
    milestones: tuple[Milestone, ...]  # the last one is the checkpoint
    orders: Orders

    @property
    def consumed(self) -> int:
        """Return the number of consumed samples."""
        return self.milestones[-1][1]


def read_saved_run(source: CheckpointSource, config: RunConfig) -> SavedRun:
    """Return the run that saved a checkpoint.

    Args:
        config: settings of the resumed run, which replace those that the checkpoint does not record.

    Raises:
        ConfigError: a file of the checkpoint is unreadable.
    """
    directory = source.directory
    manifest, record = source.manifest(), DataRecord.read(directory)
    earlier = tuple(milestone for milestone in record.milestones if milestone[0] < manifest.step)
    milestones = (*earlier, (manifest.step, manifest.consumed_samples))
    saved = source.config_over(config)
    samples = RunLength.from_config(saved, milestones).samples
    orders = record.orders or (SampleOrder.from_config(saved, samples, record.corpora),)
    return SavedRun(directory, saved, record.corpora, milestones, orders)


def check_corpora_unchanged(saved: SavedRun, corpora: dict[str, str], config: RunConfig) -> list[str]:
    """Compare the corpora of a resumed run with those of its checkpoint, and return lines for the log.

    Raises:
        ConfigError: the content of a corpus differs, and the flags do not accept the change.
    """
    changed = _changed(saved, corpora)
    if changed and not config.data.slm_accept_changed_corpora:
        raise ConfigError(
            f"--load: {', '.join(changed)} changed since the checkpoint {saved.directory} was saved, so the run "
            f"cannot continue in its order. Restore the corpus, or accept the new content with {ACCEPT}."
        )
    return [f"{prefix} changed since the checkpoint was saved; its text may be read again" for prefix in changed]


def _changed(saved: SavedRun, corpora: dict[str, str]) -> list[str]:
    before = {_corpus_path(prefix): identity for prefix, identity in saved.corpora.items()}
    return [prefix for prefix, identity in corpora.items() if before.get(_corpus_path(prefix), identity) != identity]


def _read_order(content: dict[str, Any]) -> SampleOrder:
    """Return a recorded order; earlier releases had no loss masks."""
    return SampleOrder(**{**content, "data": {"slm_loss_mask": None, **content["data"]}})


def _corpus_path(prefix: str) -> Path:
    """Return the resolved path of a corpus, which is equal for relative, absolute and linked prefixes."""
    return Path(f"{prefix}.bin").resolve()
