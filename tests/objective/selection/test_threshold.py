"""The exact threshold against sorting the gathered values, for any values and any split over ranks."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_slm.objective.selection.exact import selected_count
from megatron_slm.objective.selection.threshold import key_values, order_keys, select_highest
from megatron_slm.testing.ranks import run_ranks

FLOATS = st.floats(width=32, allow_nan=False)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 1.1754942e-38, 3.4e38])
VALUES = st.lists(st.one_of(FEW, FLOATS), min_size=1, max_size=60)


@given(VALUES)
def test_keys_sort_as_values_do_and_come_back(values: list[float]) -> None:
    x = torch.tensor(values)
    keys = order_keys(x)
    assert bool(((x[:, None] < x[None]) == (keys[:, None] < keys[None])).all())
    assert bool(((x[:, None] == x[None]) == (keys[:, None] == keys[None])).all())
    assert torch.equal(key_values(keys), x)
    assert keys.dtype == torch.int32


@given(VALUES, st.data())
def test_exact_count_threshold_and_ties(values: list[float], data: st.DataObject) -> None:
    n = len(values)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    count = data.draw(st.integers(0, int(valid.sum())))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    check(torch.tensor(values), valid, count, order, *local_selection(values, valid, count, order))


def local_selection(values, valid, count, order):  # type: ignore[no-untyped-def]
    selected, threshold = select_highest(
        torch.tensor(values)[None], valid[None], torch.tensor([count]), order[None], None
    )
    return selected[0], threshold[0]


def check(
    x: torch.Tensor, valid: torch.Tensor, count: int, order: torch.Tensor, selected: torch.Tensor, tau: torch.Tensor
) -> None:
    """Exactly ``count``; the threshold is torch.kthvalue's; ties in the order given."""
    assert int(selected.sum()) == count and not bool((selected & ~valid).any())
    if count == 0:
        assert tau == math.inf
        return
    among = x[valid]
    assert tau == torch.kthvalue(among, len(among) - count + 1).values
    places = sorted(torch.nonzero(valid).flatten().tolist(), key=lambda i: (-float(x[i]), int(order[i])))
    assert sorted(places[:count]) == torch.nonzero(selected).flatten().tolist()


@given(st.integers(1, 10**7), st.integers(1, 10**6))
def test_count_is_the_ceiling_of_the_decimal_that_was_typed(n_valid: int, millionths: int) -> None:
    ratio = millionths / 10**6
    exact = math.ceil(Fraction(str(ratio)) * n_valid)
    assert int(selected_count(ratio, torch.tensor(n_valid))) == exact


def test_lowest_ratios_select_a_token() -> None:
    assert int(selected_count(1e-300, torch.tensor(100))) == 1 and int(selected_count(1e-300, torch.tensor(0))) == 0


def test_count_is_free_of_binary_rounding() -> None:
    assert math.ceil(0.55 * 100) == 56  # result of float arithmetic
    assert int(selected_count(0.55, torch.tensor(100))) == 55


def _split_cases(rank: int, world_size: int, seed: int) -> list[tuple]:
    """Random values cut at random places over the ranks, empty parts included."""
    import torch.distributed as dist

    chance = torch.Generator().manual_seed(seed)
    results = []
    for case in range(25):
        n = int(torch.randint(1, 200, (), generator=chance))
        x = torch.randn(2, n, generator=chance)
        if case % 2:
            x = x.mul(2).round()  # many ties
        valid = torch.rand(2, n, generator=chance) < 0.8
        ratio = torch.rand(2, generator=chance)
        count = (valid.sum(1) * ratio).ceil().long()
        order = torch.stack([torch.randperm(n, generator=chance) for _ in range(2)])
        cuts = torch.randint(0, n + 1, (world_size - 1,), generator=chance).sort().values.tolist()
        begin, end = [0, *cuts][rank], [*cuts, n][rank]
        part = slice(begin, end)
        selected, tau = select_highest(x[:, part], valid[:, part], count, order[:, part], dist.group.WORLD)
        results.append((x, valid, count, order, selected, tau))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_split_over_ranks(world_size: int) -> None:
    cases = list(zip(*run_ranks(_split_cases, world_size, 7), strict=True))
    for parts in cases:
        x, valid, count, order, _, tau = parts[0]
        whole = torch.cat([part[4] for part in parts], dim=1)
        for row in range(2):
            assert all(torch.equal(part[5], tau) for part in parts)
            check(x[row], valid[row], int(count[row]), order[row], whole[row], tau[row])


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_batched_rankings_are_independent(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 40, generator=chance)
    valid = torch.rand(5, 40, generator=chance) < 0.7
    count = valid.sum(1) // 2
    order = torch.arange(40).expand(5, -1)
    selected, tau = select_highest(x, valid, count, order, None)
    for row in range(5):
        check(x[row], valid[row], int(count[row]), order[row], selected[row], tau[row])
