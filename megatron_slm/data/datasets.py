"""Training and validation datasets: Megatron-Core's GPT dataset for blends of ``.bin/.idx`` corpora."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from megatron_slm.config.schema import DataConfig
from megatron_slm.config.selection import ANSWERS
from megatron_slm.corpus.checks import check_corpus, check_tokenizer, has_several_sequences
from megatron_slm.corpus.index import read_index
from megatron_slm.corpus.loss_masks import check_mask, find_mask, has_mask, masked_identity
from megatron_slm.data.blends import Blend, parse_blend, training_blend
from megatron_slm.data.packed_samples import CorpusBuilder
from megatron_slm.data.packing import check_example_lengths
from megatron_slm.data.samples import CorpusSamples, MockSamples, SamplesConfig
from megatron_slm.data.splits import check_splits, effective_split, split_matrix, wants_split
from megatron_slm.data.usage import DatasetUsage, measure_usage
from megatron_slm.runtime.collective import on_every_rank, on_first_rank
from megatron_slm.runtime.console import notice
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.runtime.logs import only_errors
from megatron_slm.tokenizers.tokenizer import Tokenizer

MOCK: Blend = (["mock data"], None)
# Loggers that miss Megatron-Core's cache, in whose place data.index_cache is used.
CACHE_WARNINGS = ("megatron.core.datasets.gpt_dataset", "megatron.core.datasets.blended_dataset")


@dataclass(frozen=True)
class Datasets:
    """Hold the training set and the named validation sets."""

    train: Dataset
    valid: dict[str, Dataset]
    usage: Callable[[], list[DatasetUsage]] = list  # usage per corpus; reads all document lengths


def blends(data: DataConfig) -> dict[str, Blend]:
    """Return all blends of the run by flag.

    Raises:
        ConfigError: a blend is invalid.
    """
    arguments = {"--data-path": data.data_path, "--train-data-path": data.train_data_path}
    arguments |= {f"--valid-data-path {name}": blend for name, blend in data.valid_data_path.items()}
    return {flag: parse_blend(blend, flag) for flag, blend in arguments.items() if blend}


def check_corpora(data: DataConfig, tokenizer: Tokenizer) -> None:
    """Validate all corpora of a run against their format, the tokenizer and the settings.

    Raises:
        ConfigError: a corpus is missing, damaged, made with another tokenizer, or conflicts with a setting.
    """
    for flag, (prefixes, weights) in blends(data).items():
        for prefix in prefixes:
            check_corpus(prefix, flag)
            check_tokenizer(prefix, tokenizer, flag)
            if data.slm_sentences == "refuse" and has_several_sequences(prefix):
                raise ConfigError(
                    f"{flag} {prefix}: its documents have several sequences (made with --split-sentences), and "
                    "training would shuffle the sentences of a document. Recreate the corpus without it, join the "
                    "sentences of each document with --slm-sentences join, or shuffle them as Megatron-LM does with "
                    "--slm-sentences separate."
                )
        is_full_validation = data.full_validation and not (flag == "--data-path" and data.valid_data_path)
        if is_full_validation and weights is not None and flag != "--train-data-path":
            raise ConfigError(
                f"--full-validation reads every corpus exactly once and conflicts with the weights of {flag}. Omit the "
                "weights or --full-validation."
            )


def check_loss_masks(data: DataConfig, seq_length: int, *, verify: bool = True) -> None:
    """Validate the loss masks of all corpora of a fine-tuning run, and the lengths of their examples.

    Validation corpora without the mask use the mask of all answers; without that, they are plain text. Runs without
    fine-tuning print a note if a corpus has answers.

    Args:
        verify: compare the masks with their checksums.

    Raises:
        ConfigError: a mask is missing or damaged, belongs to another corpus, or an example is longer than a sample.
    """
    name = data.slm_loss_mask
    if name is None:
        _note_unused_masks(data)
        return
    for flag, (prefixes, _) in blends(data).items():
        for prefix in prefixes:
            found = find_mask(prefix, name) if flag.startswith("--valid-data-path") else name
            if found is not None:
                check_mask(prefix, found, verify=verify)
                check_example_lengths(f"{flag} {prefix}", read_index(prefix).lengths, seq_length)


def _note_unused_masks(data: DataConfig) -> None:
    """Print a note if a corpus of examples is used as plain text."""
    prefixes = dict.fromkeys(prefix for blend in blends(data).values() for prefix in blend[0])
    if found := [prefix for prefix in prefixes if has_mask(prefix, ANSWERS)]:
        notice(
            f"{', '.join(found)}: the examples of tools/preprocess_sft.py are read as plain text, prompts included and "
            "without isolation. Add --objective sft to train their answers only."
        )


def corpus_identities(data: DataConfig) -> dict[str, str]:
    """Return the identities of all corpora of the run by prefix. Collective over all ranks; rank 0 reads."""
    prefixes = dict.fromkeys(prefix for blend in blends(data).values() for prefix in blend[0])
    return on_first_rank(lambda: {prefix: masked_identity(prefix, data.slm_loss_mask) for prefix in prefixes})


def training_samples(data: DataConfig, *, tokenizer: Tokenizer, seq_length: int, samples: int, seed: int) -> Dataset:
    """Build the training dataset of a run on this rank only, for comparison.

    Raises:
        ConfigError: a corpus or one of its splits is too small.
    """
    blend = training_blend(data)
    builder = _Builder(
        data=data,
        tokenizer=tokenizer,
        seq_length=seq_length,
        train_samples=samples,
        valid_samples=0,
        seed=seed,
        identities={prefix: masked_identity(prefix, data.slm_loss_mask) for prefix in blend[0]},
    )
    return builder.train(blend)[0]


def build_datasets(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    seq_length: int,
    train_samples: int,
    valid_samples: int,
    seed: int,
    identities: dict[str, str] | None = None,
) -> Datasets:
    """Build all datasets, reading their sample indices from the cache if possible. Collective over all ranks.

    Rank 0 builds and writes the indices, then the other ranks read them.

    Args:
        train_samples: samples of the entire run, for which the corpus is repeated if necessary. If 0, no training set
            is built, and the test split of --data-path is added to the validation sets.
        valid_samples: samples per evaluation of each set; --full-validation uses one epoch instead.
        seed: seed of the document and sample order.
        identities: result of :func:`corpus_identities`, if known.

    Raises:
        ConfigError: a corpus or one of its splits is too small.
    """
    builder = _Builder(
        data=data,
        tokenizer=tokenizer,
        seq_length=seq_length,
        train_samples=train_samples,
        valid_samples=valid_samples,
        seed=seed,
        identities=corpus_identities(data) if identities is None else identities,
    )
    built: list[Datasets] = []

    def check_and_build() -> None:
        check_splits(data, valid_samples=valid_samples, seq_length=seq_length, trains=train_samples > 0)
        built.append(builder.build())

    on_first_rank(check_and_build)
    return on_every_rank(lambda: built[0] if built else builder.build())


class NoSamples(Dataset):
    """Empty training set of a run that only evaluates."""

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class _Builder:
    """Build the datasets of a run on this rank."""

    data: DataConfig
    tokenizer: Tokenizer
    seq_length: int
    train_samples: int
    valid_samples: int
    seed: int
    identities: dict[str, str]

    def build(self) -> Datasets:
        if self.data.mock_data:
            return self._mock()
        if not self.train_samples:
            return Datasets(NoSamples(), self._held_out())
        blend = training_blend(self.data)
        train, valid = self.train(blend)
        reports = [partial(measure_usage, "train", train, blend, self.train_samples)]
        for name, arguments in self.data.valid_data_path.items():
            held_out = parse_blend(arguments)
            valid[name] = self._valid(name, held_out)
            if len(held_out[0]) > 1:
                size: int = len(valid[name])  # type: ignore[arg-type]
                wanted = min(size, self._valid_size or size)
                reports.append(partial(measure_usage, name, valid[name], held_out, wanted))
        return Datasets(train, valid, lambda: [row for report in reports for row in report()])

    @property
    def _valid_size(self) -> int | None:
        return None if self.data.full_validation else self.valid_samples

    def _mock(self) -> Datasets:
        """Return Megatron-LM's mock data, a third each for training, validation and test."""
        test_size = 0 if self.train_samples else self._valid_size
        train, *held_out = self._split(None, [self.train_samples, self._valid_size, test_size])
        valid = {name: split for name, split in zip(("valid", "test"), held_out, strict=True) if split is not None}
        if train is None:
            return Datasets(NoSamples(), valid)
        return Datasets(train, valid, partial(measure_usage, "train", train, MOCK, self.train_samples))

    def train(self, blend: Blend) -> tuple[Dataset, dict[str, Dataset]]:
        """Return the training set, and the validation set if it is a split of --data-path."""
        valid: dict[str, Dataset] = {}
        if self.data.train_data_path:
            train = self._per_split([blend, None, None], [self.train_samples, 0, 0])[0]
        else:
            want_split = wants_split(self.data, self.valid_samples)
            train, held_out, _ = self._split(blend, [self.train_samples, self._valid_size if want_split else 0, 0])
            if want_split and held_out is not None:
                valid["valid"] = held_out
        if train is None:
            raise ConfigError("the training split is empty. Check --data-path and --split.")
        self._check_size(train, blend)
        return train, valid

    def _held_out(self) -> dict[str, Dataset]:
        """Return the sets of --valid-data-path, or the validation and the test split of --data-path."""
        if not wants_split(self.data, self.valid_samples):
            blends = {name: parse_blend(arguments) for name, arguments in self.data.valid_data_path.items()}
            return {name: self._valid(name, blend) for name, blend in blends.items()}
        sizes = [0, self._valid_size, self._valid_size]
        _, valid, test = self._split(parse_blend(self.data.data_path), sizes)
        return {name: split for name, split in (("valid", valid), ("test", test)) if split is not None}

    def _valid(self, name: str, blend: Blend) -> Dataset:
        built = self._per_split([None, blend, None], [0, self._valid_size, 0])[1]
        if built is None or not len(built):  # type: ignore[arg-type]
            raise ConfigError(f"--valid-data-path {name}: too few tokens for a sample of {self.seq_length} tokens.")
        return built

    def _check_size(self, train: Dataset, blend: Blend) -> None:
        """Raise ConfigError if a blend without weights, which is read only once, is too small for the run."""
        size: int = len(train)  # type: ignore[arg-type]
        if size < self.train_samples:
            raise ConfigError(
                f"the {len(blend[0])} corpora have {size:,} samples in one epoch, but the run requires "
                f"{self.train_samples:,}. Corpora without weights are read once: add weights (--data-path W1 P1 W2 "
                "P2), or reduce --train-iters."
            )

    def _split(self, blend: Blend | None, sizes: list[int | None]) -> list[Dataset | None]:
        """Build the splits of one blend, or of mock data."""
        config = self._config(blend=blend, split=effective_split(self.data))
        matrix = config.split_matrix if blend is None else split_matrix(self.data)
        # Unused splits are not built: Megatron-Core would never terminate for an empty one.
        config.split_matrix = [None if size == 0 else split for split, size in zip(matrix, sizes, strict=True)]
        return self._build(config, sizes)

    def _per_split(self, blend_per_split: list[Blend | None], sizes: list[int | None]) -> list[Dataset | None]:
        """Build splits with separate blends."""
        return self._build(self._config(blend_per_split=blend_per_split), sizes)

    def _build(self, config: SamplesConfig, sizes: list[int | None]) -> list[Dataset | None]:
        kind = MockSamples if config.mock else CorpusSamples
        with only_errors(*CACHE_WARNINGS):
            splits: list[Dataset | None] = CorpusBuilder(kind, sizes, lambda: True, config).build()
        return splits

    def _config(self, **source: Any) -> SamplesConfig:
        data = self.data
        return SamplesConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            tokenizer=self.tokenizer,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
            eod_mask_loss=data.eod_mask_loss,
            create_attention_mask=False,
            identities=self.identities,
            cache_directory=data.data_cache_path,
            data_order=data.data_order,
            join_sentences=data.slm_sentences == "join",
            loss_mask=data.slm_loss_mask,
            **source,
        )
