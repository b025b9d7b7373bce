"""Sets of groups that are expected to cost least."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import count_removed

from lf_hf.choose.sets import cheapest_sets, estimate_costs, propose_sets
from lf_hf.decoder.decoder import Group, Groups


def random_costs(layers: int, seed: int) -> dict[Group, float]:
    random = torch.Generator().manual_seed(seed)
    groups = [(i, j) for i in range(1, layers - 1) for j in range(i + 1, min(i + 6, layers - 1))]
    return dict(zip(groups, torch.rand(len(groups), generator=random).tolist(), strict=True))


def all_sets(costs: dict[Group, float], fewer: int) -> list[tuple[float, Groups]]:
    found = []
    for count in range(1, fewer + 1):
        for groups in itertools.combinations(sorted(costs), count):
            apart = all(a[1] < b[0] for a, b in itertools.pairwise(groups))
            if apart and count_removed(groups) == fewer:
                found.append((sum(costs[group] for group in groups), groups))
    return sorted(found)


@pytest.mark.parametrize("fewer", [1, 2, 3, 5])
def test_the_cheapest_sets_are_those_of_an_exhaustive_search(fewer: int) -> None:
    costs = random_costs(9, fewer)
    expected = all_sets(costs, fewer)
    assert cheapest_sets(costs, fewer, count=4) == [groups for _, groups in expected[:4]]


def test_a_long_group_is_expected_to_cost_what_threes_show_of_neighbours() -> None:
    """Here what each layer and each two neighbours cost adds up. Nothing is expected of what cannot be computed."""
    layer, two = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).tolist()
    costs = {(i, j): sum(layer[i + 1 : j + 1]) + sum(two[i + 1 : j]) for i in range(1, 8) for j in range(i + 1, 9)}
    short = {(i, j): c for (i, j), c in costs.items() if j - i < 3}
    estimated = estimate_costs(short, longest=8)
    lowered = estimated[1, 4] / costs[1, 4]
    assert 0.9 < lowered < 1
    assert estimated == pytest.approx({(i, j): c * lowered ** max(0, j - i - 2) for (i, j), c in costs.items()})
    assert estimate_costs(costs, longest=8) == costs
    estimated = estimate_costs(short | {(4, 5): 9.0}, longest=8)  # a pair that costs more than any three that it is in
    assert min(estimated.values()) >= min(short.values())
    assert math.isinf(estimate_costs(short | {(4, 5): math.inf}, longest=8)[2, 8])


def test_the_first_sets_that_are_tried_differ() -> None:
    """They would be all but alike where costs of groups alone decide; the first one is the cheapest."""
    costs = {(i, j): (j - i) * (1 + 0.01 * i) for i, j in random_costs(30, 0)}
    tried: dict[Groups, float] = {}
    for _ in range(8):
        [groups, *_] = propose_sets(costs, tried, 10, count=1)
        joined = {layer for first, last in groups for layer in range(first + 1, last + 1)}
        for other in tried:
            assert len(joined - {layer for first, last in other for layer in range(first + 1, last + 1)}) >= 2
        tried[groups] = sum(costs[group] for group in groups)
    assert next(iter(tried)) == cheapest_sets(costs, 10, count=1)[0]


def test_trials_find_what_costs_of_groups_do_not_show() -> None:
    """Here four layers cost far more to join than the table says."""
    costs = {(i, j): (j - i) * (1 + 0.01 * i) for i, j in random_costs(12, 0)}

    def whole(groups: Groups) -> float:
        joined = [layer for first, last in groups for layer in range(first + 1, last + 1)]
        dear = sum(layer in (2, 3, 4, 5) for layer in joined)
        return sum(costs[group] for group in groups) + dear

    tried: dict[Groups, float] = {}
    for _ in range(8):
        groups, *others = propose_sets(costs, tried, 4, count=3)
        assert not {groups, *others} & tried.keys() and len({groups, *others}) == 3 and count_removed(groups) == 4
        tried[groups] = whole(groups)
    first, best = next(iter(tried)), min(tried, key=lambda groups: tried[groups])
    assert first == cheapest_sets(costs, 4, count=1)[0] and tried[first] == whole(first)
    assert tried[best] == min(whole(groups) for _, groups in all_sets(costs, 4)) < tried[first] - 2


def test_trials_find_that_many_groups_cost_more() -> None:
    """Here by the table single joins cost least, and each group beside the first costs as much as four more."""
    costs = {(i, j): (j - i) ** 1.1 * (1 + 0.01 * i) for i, j in random_costs(30, 0)}
    tried: dict[Groups, float] = {}
    for _ in range(3):
        [groups, *_] = propose_sets(costs, tried, 10, count=1)
        tried[groups] = sum(costs[group] for group in groups) + 4 * (len(groups) - 1)
    first, *_, last = [len(groups) for groups in tried]
    assert first == 10 and last == 2
