"""The data of a resumed run, compared with those of its checkpoint: changed corpora, and text that is read again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.config.checkpoint_files import read_manifest, saved_config
from megatron_slm.config.schema import Config
from megatron_slm.data.blends import training_blend
from megatron_slm.data.datasets import training_samples
from megatron_slm.data.overlap import order_overlap
from megatron_slm.data.places import label_places, locate_sample
from megatron_slm.data.tokenizers.tokenizer import Tokenizer
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.files import write_text
from megatron_slm.training.run_length import START, Milestone, RunLength

DATA_FILE = "data.json"  # of a checkpoint: its DataRecord
ACCEPT = "--slm-accept-changed-corpora"
SAMPLES_PROBED = 64  # to determine if two orders are the same


@dataclass(frozen=True)
class DataRecord:
    """The data that a run has read, for its checkpoints."""

    corpora: dict[str, str] = field(default_factory=dict)  # identities by prefix
    milestones: tuple[Milestone, ...] = START  # the start of the run, and where it was resumed

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
            content = json.loads(path.read_text(encoding="utf-8"))
            milestones = tuple((int(step), int(samples)) for step, samples in content["milestones"])
            return DataRecord(dict(content["corpora"]), milestones)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--load: {path} cannot be read: {error}. Choose another step.") from error


@dataclass(frozen=True)
class SavedRun:
    """The run that a checkpoint was saved by, up to that step."""

    directory: Path
    config: Config
    corpora: dict[str, str]  # identities by prefix
    milestones: tuple[Milestone, ...]  # the last one is that of the checkpoint

    @property
    def consumed(self) -> int:
        """Samples that were consumed."""
        return self.milestones[-1][1]

    @property
    def length(self) -> RunLength:
        """The length that the run had when it was saved."""
        return RunLength.of(self.config, self.milestones)


def read_saved_run(directory: Path) -> SavedRun:
    """Return the run that a checkpoint was saved by.

    Raises:
        ConfigError: a file of the checkpoint cannot be read.
    """
    manifest, record = read_manifest(directory, "--load"), DataRecord.read(directory)
    earlier = tuple(milestone for milestone in record.milestones if milestone[0] < manifest.step)
    milestones = (*earlier, (manifest.step, manifest.consumed_samples))
    return SavedRun(directory, saved_config(directory), record.corpora, milestones)


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


def repetition_report(
    saved: SavedRun, corpora: dict[str, str], config: Config, tokenizer: Tokenizer, train: Any
) -> list[str]:
    """Return lines that count the next tokens that the run has read before, if its order of samples changed.

    Args:
        corpora: identities of the corpora now.
        train: the training dataset from now on.
    """
    if not saved.consumed or saved.config.data.mock_data or config.data.mock_data or _changed(saved, corpora):
        return []
    if not all(Path(f"{prefix}.bin").is_file() for prefix in _prefixes(saved.config)):
        return ["the corpora of the checkpoint are not there: tokens that were read before cannot be counted"]
    before = training_samples(
        saved.config.data,
        tokenizer=tokenizer,
        seq_length=saved.config.model.seq_length or 0,
        samples=saved.length.samples,
        seed=saved.config.training.seed,
    )
    if _is_same_order(before, train, saved.consumed):
        return []
    stop = min(RunLength.of(config, saved.milestones).samples, saved.consumed + _epoch_samples(train))
    found = order_overlap(before, saved.consumed, train, stop)
    advised = found.seen and config.data.data_order != "stable"
    hint = " A run with --data-order stable can be extended without that." if advised else ""
    return [
        f"the order of samples is not that of the checkpoint: of the next {found.tokens:,} tokens, "
        f"{'' if found.is_exact else 'about '}{found.seen:,} ({found.share:.1%}) were read before.{hint}"
    ]


def _changed(saved: SavedRun, corpora: dict[str, str]) -> list[str]:
    before = {_file_of(prefix): identity for prefix, identity in saved.corpora.items()}
    return [prefix for prefix, identity in corpora.items() if before.get(_file_of(prefix), identity) != identity]


def _file_of(prefix: str) -> Path:
    """Return the same file for every spelling of a prefix: relative, absolute, through links."""
    return Path(f"{prefix}.bin").resolve()


def _prefixes(config: Config) -> Iterable[str]:
    return training_blend(config.data)[0]


def _is_same_order(before: Any, after: Any, consumed: int) -> bool:
    """Return whether the samples that were consumed are the first ones of ``after`` as well."""
    stop = min(consumed, len(before), len(after))
    indices = np.linspace(0, stop - 1, min(stop, SAMPLES_PROBED)).round().astype(np.int64).tolist()
    return all(_places(before, index) == _places(after, index) for index in indices)


def _places(dataset: Any, index: int) -> tuple[str, list[tuple[int, int]]]:
    corpus, number = locate_sample(dataset, index)
    return str(Path(corpus.dataset.path_prefix).resolve()), list(label_places(corpus, number))


def _epoch_samples(dataset: Any) -> int:
    """Return the samples of one epoch of all corpora."""
    corpora = getattr(dataset, "datasets", [dataset])
    tokens = sum(int(c.dataset.sequence_lengths[c.indices].sum(dtype=np.int64)) for c in corpora)
    return max(tokens // corpora[0].config.sequence_length, 1)
