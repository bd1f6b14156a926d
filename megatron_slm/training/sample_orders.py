"""Sample orders of a run, and the repetition of tokens after a change of order.

An order is recorded as the settings from which it can be rebuilt. A run that was extended twice, or whose seed changed
twice, has three orders.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.config.schema import DataConfig, RunConfig
from megatron_slm.corpus.loss_masks import masked_identity
from megatron_slm.data.blends import training_blend
from megatron_slm.data.datasets import training_samples
from megatron_slm.data.overlap import ReadSamples, order_overlap
from megatron_slm.data.sample_locations import corpus_file, label_ranges, locate_sample
from megatron_slm.data.splits import effective_split
from megatron_slm.runtime.errors import ConfigError
from megatron_slm.tokenizers.tokenizer import Tokenizer

SAMPLES_PROBED = 64  # samples compared between two orders
# The data settings on which an order depends, in addition to the split.
DATA_SETTINGS = ("data_path", "train_data_path", "data_order", "slm_sentences", "mock_data", "slm_loss_mask")


@dataclass(frozen=True)
class SampleOrder:
    """Represent a sample order and the first sample that a run has read in it."""

    first: int
    samples: int  # dataset size, on which Megatron-LM's order depends
    seq_length: int
    seed: int
    data: dict[str, Any]  # the data settings on which the order depends
    corpora: dict[str, str]  # identities by prefix

    @staticmethod
    def from_config(config: RunConfig, samples: int, identities: dict[str, str], first: int = 0) -> SampleOrder:
        """Return the order of a run of ``samples`` samples.

        Args:
            identities: corpus identities by prefix, including all training corpora.
            first: first sample that is read in this order.
        """
        data = {name: getattr(config.data, name) for name in DATA_SETTINGS} | {"split": effective_split(config.data)}
        prefixes = [] if config.data.mock_data else training_blend(config.data)[0]
        corpora = {prefix: identities[prefix] for prefix in prefixes if prefix in identities}
        return SampleOrder(first, samples, config.model.seq_length, config.training.seed, data, corpora)

    def starting_at(self, first: int) -> SampleOrder:
        """Return the same order, read from sample ``first``."""
        return replace(self, first=first)

    @property
    def is_mock(self) -> bool:
        """Return whether the samples are mock data."""
        return bool(self.data["mock_data"])


Orders = tuple[SampleOrder, ...]  # sorted by first sample; each ends at the start of the next


@dataclass(frozen=True)
class OrderBuilder:
    """Build the datasets of recorded orders; not collective.

    Args:
        data: current data settings, overridden by those of an order.
        identities: corpus identities of the run by prefix.
    """

    data: DataConfig
    tokenizer: Tokenizer
    identities: dict[str, str]

    def build(self, order: SampleOrder) -> Any:
        """Return the training dataset of an order. A moved corpus is identified by its content.

        Raises:
            ConfigError: a corpus is missing, or its content has changed.
        """
        mask = order.data["slm_loss_mask"]
        moved = {prefix: self._locate(prefix, identity, mask) for prefix, identity in order.corpora.items()}
        paths = {
            name: [moved.get(value, value) for value in order.data[name]] for name in ("data_path", "train_data_path")
        }
        data = replace(self.data, **{**order.data, **paths}, valid_data_path={})
        return training_samples(
            data, tokenizer=self.tokenizer, seq_length=order.seq_length, samples=order.samples, seed=order.seed
        )

    def _locate(self, prefix: str, identity: str, mask: str | None) -> str:
        if self.identities.get(prefix) == identity:
            return prefix
        found = next((name for name, content in self.identities.items() if content == identity), None)
        if found is not None:
            return found
        if not all(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx")):
            raise ConfigError(f"the corpus {prefix} is missing")
        if masked_identity(prefix, mask) != identity:
            raise ConfigError(f"the content of the corpus {prefix} has changed")
        return prefix


def continue_orders(
    orders: Orders, consumed: int, order: SampleOrder, dataset: Any, builder: OrderBuilder
) -> tuple[Orders, bool]:
    """Return the orders of a run that continues in ``order``, and whether the order changes.

    Args:
        orders: orders of the run so far.
        consumed: number of samples that the run has read.
        dataset: training dataset of ``order``.
    """
    orders = tuple(each for each in orders if each.first < consumed)
    if not orders:
        return (order.starting_at(consumed),), False
    last = orders[-1]
    if order.starting_at(last.first) == last:
        return orders, False
    if _reads_the_same(last, order, dataset, consumed, builder):
        return (*orders[:-1], order.starting_at(last.first)), False
    return (*orders, order.starting_at(consumed)), True


def repetition_report(orders: Orders, dataset: Any, stop: int, builder: OrderBuilder) -> list[str]:
    """Return log lines with the share of upcoming tokens that the run has read before.

    Args:
        orders: orders of the run; the last one starts now.
        dataset: training dataset of the last order.
        stop: end of the run in samples; at most one epoch is counted.
    """
    lines: list[str] = []
    first = orders[-1].first
    stop = min(stop, first + _epoch_samples(dataset))
    found = order_overlap(_rebuilt(orders, builder, lines), dataset, first, stop)
    advised = found.seen and builder.data.data_order != "stable"
    hint = " With --data-order stable, a run can be extended without repetition." if advised else ""
    return [
        *lines,
        f"the sample order differs from the checkpoint's: of the next {found.tokens:,} tokens, "
        f"{'' if found.is_exact else 'about '}{found.seen:,} ({found.share:.1%}) were read before.{hint}",
    ]


def _rebuilt(orders: Orders, builder: OrderBuilder, lines: list[str]) -> Iterator[ReadSamples]:
    """Yield the samples read in all orders except the last; append a line for each order that cannot be rebuilt."""
    for order, following in itertools.pairwise(orders):
        if order.is_mock:
            continue
        try:
            yield ReadSamples(builder.build(order), order.first, following.first)
        except (ConfigError, OSError) as error:
            count, reason = following.first - order.first, str(error).rstrip(".")
            lines.append(f"{count:,} earlier samples are not counted as read before: {reason}.")


def _reads_the_same(last: SampleOrder, order: SampleOrder, dataset: Any, consumed: int, builder: OrderBuilder) -> bool:
    """Return whether the samples read in the last order are identical in the new order."""
    if last.is_mock or order.is_mock:
        return False
    try:
        before = builder.build(last)
    except (ConfigError, OSError):
        return False
    stop = min(consumed, len(before), len(dataset))
    count = min(stop - last.first, SAMPLES_PROBED)
    indices: Sequence[int] = np.linspace(last.first, stop - 1, count).round().astype(np.int64).tolist()
    return all(_places(before, index) == _places(dataset, index) for index in indices)


def _places(dataset: Any, index: int) -> tuple[Path, list[tuple[int, int]]]:
    corpus, number = locate_sample(dataset, index)
    return corpus_file(corpus), list(label_ranges(corpus, number))


def _epoch_samples(dataset: Any) -> int:
    """Return the number of samples in one epoch of all corpora."""
    corpora = getattr(dataset, "datasets", [dataset])
    return max(int(sum(corpus.samples_per_epoch() for corpus in corpora)), 1)
