"""Simulated steps of many ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_slm.planning.simulation import (
    SCOPES,
    Cluster,
    allreduce_seconds,
    expected_maximum,
    expected_straggling,
    simulate,
)

CLUSTER = Cluster(ranks=256, model_parallel=1, micro_batches=4, stall_probability=0.0)


def test_a_seed_defines_the_result() -> None:
    first, second, other = (simulate(CLUSTER, "data-parallel", 5, seed).steps for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_scopes_are_compared_on_the_same_times() -> None:
    found = {scope: simulate(CLUSTER, scope, 5, 0) for scope in SCOPES}
    for result in found.values():
        assert np.array_equal(result.without_selection, found["micro-batch"].without_selection)
    assert found["micro-batch"].overhead == 0
    assert 0 < found["global-batch, predicted"].overhead < found["data-parallel"].overhead


def test_ranks_with_jitter_wait_in_every_shared_ranking() -> None:
    without_latency = replace(CLUSTER, hop_seconds=0.0)
    assert simulate(without_latency, "data-parallel", 5, 0).overhead > 0
    assert simulate(without_latency, "global-batch, predicted", 5, 0).overhead == 0


def test_ranks_without_jitter_do_not_wait() -> None:
    result = simulate(replace(CLUSTER, jitter=0.0, hop_seconds=0.0), "data-parallel", 3, 0)
    assert result.steps == pytest.approx(4 * 0.5)
    assert result.straggling == pytest.approx(0)


@pytest.mark.parametrize("ranks", [16, 1024])
def test_the_slowest_rank_is_as_slow_as_expected(ranks: int) -> None:
    cluster = replace(CLUSTER, ranks=ranks)
    result = simulate(cluster, "micro-batch", 200, 0)
    assert result.straggling == pytest.approx(expected_straggling(cluster), rel=0.1)


def test_expected_maximum_of_normal_values() -> None:
    values = np.random.default_rng(0).standard_normal((2000, 1024)).max(1)
    assert expected_maximum(1024) == pytest.approx(values.mean(), abs=0.02)
    assert expected_maximum(1) == 0


def test_a_slow_rank_slows_every_step() -> None:
    slow = replace(CLUSTER, slow_share=0.1, slow_factor=2.0)
    assert simulate(slow, "micro-batch", 3, 0).straggling > 0.7


def test_latency_grows_with_the_logarithm_of_the_replicas() -> None:
    certain = replace(CLUSTER, hop_jitter=1e-3)
    seconds = [allreduce_seconds(replace(certain, ranks=2**power), 1, np.random.default_rng(0)) for power in (4, 8)]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.01) == pytest.approx(2 * 8 * 5e-6, rel=0.01)
    assert allreduce_seconds(certain, 0, np.random.default_rng(0)) == 0
