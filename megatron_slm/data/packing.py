"""Packing of examples into samples: every example is whole, and the sample order depends on the seed only.

Epoch e shuffles the examples with a generator seeded by (--seed, e), packs them in this order with the best-fit
algorithm, and shuffles the samples. The first samples of a run are therefore independent of its length.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_slm.runtime.errors import ConfigError


def best_fit(lengths: Iterable[int], capacity: int) -> np.ndarray:
    """Return the pack of each example, [examples] int64.

    Every example is added to a pack with the least sufficient space, or to a new one. Packs are numbered from 0.

    Args:
        lengths: tokens of each example, at most ``capacity``.
        capacity: tokens of a pack.
    """
    packs: list[int] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit n is set if a pack has space for exactly n tokens
    count = 0
    for length in lengths:
        sufficient = occupied >> length
        if sufficient:
            space = length + (sufficient & -sufficient).bit_length() - 1
            pack = by_space[space].pop()
            if not by_space[space]:
                occupied ^= 1 << space
        else:
            space, pack, count = capacity, count, count + 1
        packs.append(pack)
        if space > length:
            by_space[space - length].append(pack)
            occupied |= 1 << (space - length)
    return np.array(packs, np.int64)


def packed_indices(
    examples: np.ndarray, lengths: np.ndarray, *, seq_length: int, seed: int, samples: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build the document, sample and shuffle index of a packed dataset in Megatron-Core's format.

    A sample extends from the first token of its first example to that of the next sample's. An additional document at
    the end of the document index ends the last sample.

    Args:
        examples: sequence numbers of the examples, at least one.
        lengths: tokens of each of them.
        seq_length: tokens of a sample.
        seed: seed of the order.
        samples: least number of samples; None: one epoch.
    """
    documents: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    orders: list[np.ndarray] = []
    count = 0
    while not orders or count < (samples or 1):
        rng = np.random.RandomState([seed, len(orders)])
        order = rng.permutation(len(examples))
        packs = best_fit(lengths[order].tolist(), seq_length)
        by_pack = np.argsort(packs, kind="stable")
        starts.append(np.flatnonzero(np.diff(packs[by_pack], prepend=-1)) + len(documents) * len(examples))
        documents.append(examples[order[by_pack]])
        orders.append(rng.permutation(len(starts[-1])) + count)
        count += len(orders[-1])
    ends = np.append(np.concatenate(starts), len(documents) * len(examples))
    sample_index = np.stack((ends, np.zeros_like(ends)), 1)
    document_index = np.append(np.concatenate(documents), examples[:1]).astype(np.int32)
    return document_index, sample_index, np.concatenate(orders)


def check_example_lengths(prefix: str, lengths: np.ndarray, seq_length: int) -> None:
    """Raise ConfigError if an example is longer than a sample."""
    longest = int(lengths.max(initial=0))
    if longest > seq_length:
        raise ConfigError(
            f"{prefix}: {int((lengths > seq_length).sum()):,} of {len(lengths):,} examples are longer than "
            f"--seq-length {seq_length}; the longest has {longest:,} tokens. Recreate the corpus with "
            f"tools/preprocess_sft.py --seq-length {seq_length} --long-examples drop (or truncate), or increase "
            "--seq-length."
        )
