"""Simulation of step times on many ranks: stragglers, and the latency of the selection's all-reduces.

Ranks wait for each other where the program does: those of a model-parallel group in every micro-batch, all ranks at the
end of the step, and all ranks in every ranking of the selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SCOPES = {  # rankings that all ranks share: per micro-batch, and per step
    "micro-batch": (0, 0),
    "data-parallel": (1, 0),
    "global-batch, predicted": (0, 1),
}


@dataclass(frozen=True)
class Cluster:
    """Hold the assumptions of a simulation; times in seconds."""

    ranks: int
    model_parallel: int = 8  # ranks that share a model replica
    micro_batches: int = 8
    micro_batch_seconds: float = 0.5
    jitter: float = 0.01  # standard deviation of a micro-batch's time, relative to its mean
    stall_probability: float = 1e-6  # of a rank in a micro-batch: interrupts, page faults, retries of a link
    stall_seconds: float = 0.5
    slow_share: float = 0.0  # share of the ranks that are permanently slower
    slow_factor: float = 1.1
    hop_seconds: float = 5e-6  # latency of one message
    hop_jitter: float = 0.5  # its standard deviation, relative to the mean
    rounds: int = 7  # all-reduces of a ranking on a GPU: count, three histograms, three of ties

    @property
    def replicas(self) -> int:
        """Return the number of data-parallel replicas."""
        return max(self.ranks // self.model_parallel, 1)


@dataclass(frozen=True)
class Result:
    """Hold simulated step times in seconds, [steps] each."""

    steps: NDArray[np.float64]  # with the selection
    without_selection: NDArray[np.float64]  # the same times of the same ranks
    collectives: NDArray[np.float64]  # latency of the selection's all-reduces, which ``steps`` include
    single_rank: NDArray[np.float64]  # of an average rank, alone

    @property
    def overhead(self) -> float:
        """Return the mean overhead of the selection, relative to the step."""
        return float(self.steps.mean() / self.without_selection.mean() - 1)

    @property
    def straggling(self) -> float:
        """Return the mean slow-down by waiting for the slowest rank, without selection."""
        return float(self.without_selection.mean() / self.single_rank.mean() - 1)


def simulate(cluster: Cluster, scope: str, steps: int, seed: int) -> Result:
    """Simulate steps with a selection scope; the same seed gives the same times of the ranks in every scope."""
    rng, latency_rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    slow = rng.random(cluster.ranks) < cluster.slow_share
    factor = np.where(slow, cluster.slow_factor, 1.0)
    per_micro_batch, per_step = SCOPES[scope]
    rows = []
    for _ in range(steps):
        times = micro_batch_times(cluster, factor, rng)
        replicas = _slowest_of_groups(times, cluster.model_parallel)
        apart = replicas.sum(1).max()
        waits = replicas.max(0).sum() if per_micro_batch else apart
        rankings = per_micro_batch * cluster.micro_batches + per_step
        latency = allreduce_seconds(cluster, rankings * cluster.rounds, latency_rng)
        rows.append((waits + latency, apart, latency, times.sum(1).mean()))
    return Result(*np.array(rows).T)


def micro_batch_times(cluster: Cluster, factor: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the time of each rank in each micro-batch, [ranks, micro-batches]."""
    shape = (cluster.ranks, cluster.micro_batches)
    noise = 1 + cluster.jitter * rng.standard_normal(shape)
    stalls = rng.random(shape) < cluster.stall_probability
    times = factor[:, None] * cluster.micro_batch_seconds * np.maximum(noise, 0.0)
    return times + cluster.stall_seconds * stalls


def _slowest_of_groups(times: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return the times of replicas, whose ranks wait for each other in every micro-batch."""
    size = min(size, len(times))
    whole = len(times) // size * size
    return times[:whole].reshape(-1, size, times.shape[1]).max(1)


def allreduce_seconds(cluster: Cluster, count: int, rng: np.random.Generator) -> float:
    """Return the latency of ``count`` all-reduces in a tree: up and down, at each level the slowest message.

    The messages of a level are sent at the same time; their latencies are gamma-distributed.
    """
    if not count or cluster.replicas < 2:
        return 0.0
    shape = 1 / cluster.hop_jitter**2
    total, messages = 0.0, cluster.replicas
    while messages > 1:
        messages = -(-messages // 2)
        slowest = rng.gamma(shape, cluster.hop_seconds / shape, size=(2 * count, messages)).max(1)
        total += float(slowest.sum())
    return total


def expected_maximum(count: int) -> float:
    """Return the expected maximum of independent standard normal values, by Blom's approximation."""
    from statistics import NormalDist

    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def expected_straggling(cluster: Cluster) -> float:
    """Return the slow-down by jitter alone, if all ranks wait for each other once per step."""
    spread = cluster.jitter / math.sqrt(cluster.micro_batches)
    return spread * expected_maximum(cluster.ranks)
