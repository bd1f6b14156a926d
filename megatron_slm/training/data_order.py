"""The record of the data that a run has read, in its checkpoints, and changed corpora on resume."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.config.checkpoint_files import read_manifest, saved_config
from megatron_slm.config.schema import Config
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import write_text
from megatron_slm.training.run_length import START, Milestone, RunLength
from megatron_slm.training.sample_orders import Orders, SampleOrder

DATA_FILE = "data.json"  # of a checkpoint: its DataRecord
ACCEPT = "--slm-accept-changed-corpora"


@dataclass(frozen=True)
class DataRecord:
    """The data that a run has read, for its checkpoints."""

    corpora: dict[str, str] = field(default_factory=dict)  # identities by prefix
    milestones: tuple[Milestone, ...] = START  # the start of the run, and where it was resumed
    orders: Orders = ()  # in which samples were read; empty in checkpoints of an earlier release
    reference: str | None = None  # identity of the reference model; None: there is none, or it is not known

    def write(self, directory: Path) -> None:
        """Write the record into a checkpoint directory."""
        write_text(directory / DATA_FILE, json.dumps(asdict(self), indent=1) + "\n", "--save")

    @staticmethod
    def read(directory: Path) -> DataRecord:
        """Read the record of a checkpoint; that of one of an earlier release is empty.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = directory / DATA_FILE
        if not path.exists():
            return DataRecord()
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            milestones = tuple((int(step), int(samples)) for step, samples in content["milestones"])
            orders = tuple(SampleOrder(**order) for order in content.get("orders", ()))
            return DataRecord(dict(content["corpora"]), milestones, orders, content.get("reference"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--load: {path} cannot be read: {error}. Choose another step.") from error


@dataclass(frozen=True)
class SavedRun:
    """The run that a checkpoint was saved by, up to that step."""

    directory: Path
    config: Config
    corpora: dict[str, str]  # identities by prefix
    milestones: tuple[Milestone, ...]  # the last one is that of the checkpoint
    orders: Orders

    @property
    def consumed(self) -> int:
        """Samples that were consumed."""
        return self.milestones[-1][1]


def read_saved_run(directory: Path) -> SavedRun:
    """Return the run that a checkpoint was saved by.

    Raises:
        ConfigError: a file of the checkpoint cannot be read.
    """
    manifest, record = read_manifest(directory, "--load"), DataRecord.read(directory)
    earlier = tuple(milestone for milestone in record.milestones if milestone[0] < manifest.step)
    milestones = (*earlier, (manifest.step, manifest.consumed_samples))
    config = saved_config(directory)
    samples = RunLength.of(config, milestones).samples
    orders = record.orders or (SampleOrder.of(config, samples, record.corpora),)
    return SavedRun(directory, config, record.corpora, milestones, orders)


def check_corpora_unchanged(saved: SavedRun, corpora: dict[str, str], config: Config) -> list[str]:
    """Compare the corpora of a resumed run with those of its checkpoint; return lines for the log.

    Raises:
        ConfigError: a corpus has another content, and the flags do not accept that.
    """
    changed = _changed(saved, corpora)
    if changed and not config.data.slm_accept_changed_corpora:
        raise ConfigError(
            f"--load: {', '.join(changed)} changed since the checkpoint {saved.directory} was saved, so that the run "
            f"cannot continue in its order. Restore the corpus, or accept the new content with {ACCEPT}."
        )
    return [f"{prefix} changed since the checkpoint was saved; text of it may be read again" for prefix in changed]


def _changed(saved: SavedRun, corpora: dict[str, str]) -> list[str]:
    before = {_file_of(prefix): identity for prefix, identity in saved.corpora.items()}
    return [prefix for prefix, identity in corpora.items() if before.get(_file_of(prefix), identity) != identity]


def _file_of(prefix: str) -> Path:
    """Return the same file for every spelling of a prefix: relative, absolute, through links."""
    return Path(f"{prefix}.bin").resolve()
