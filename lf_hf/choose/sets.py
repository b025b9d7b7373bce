"""Sets of groups that are expected to cost least, by dynamic programming over costs of single groups.

This module knows no model: costs are numbers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import numpy as np

from lf_hf.decoder.decoder import Group, Groups

_SHRINKAGE = 1.0  # ridge penalty on extra costs, as trials are few
_LOWERED = 0.94  # estimated costs of groups, for each layer after the third
_CANDIDATES = 256  # sets from which the next ones to try are taken
_DIFFERENT = 8  # so many of the first sets that are tried differ, in one of `_SHARE` joined layers at least
_SHARE = 5
_TURNS = 3  # one of so many proposals supposes that groups beside the first cost more


def estimate_costs(measured: Mapping[Group, float], longest: int) -> dict[Group, float]:
    """Costs of all groups of up to `longest` layers, where those of all pairs of layers were measured, if not more.

    A group that was not measured costs what it does without its last layer and without its first one, less what the
    layers between these two cost, which is in both, but no less than either. Many long groups cost less than that, and
    what seems cheap is measured before it is taken, so estimates are lowered for each layer after the third.
    """
    costs = dict(measured)
    bottom, top = min(measured)[0], max(last for _, last in measured)
    for more in range(2, longest):
        for first in range(bottom, top + 1 - more):
            last = first + more
            if (first, last) in costs:
                continue
            parts = costs[first, last - 1], costs[first + 1, last]
            common = costs.get((first + 1, last - 1), 0.0)  # a single layer costs nothing
            expected = sum(parts) - common
            costs[first, last] = max(expected, *parts) if math.isfinite(expected) else math.inf
    return {
        (first, last): cost if (first, last) in measured else cost * _LOWERED ** (last - first - 2)
        for (first, last), cost in costs.items()
    }


def cheapest_sets(costs: Mapping[Group, float], num_fusions: int, *, count: int) -> list[Groups]:
    """The `count` sets of groups of least summed cost that leave `num_fusions` layers fewer, cheapest first.

    By dynamic programming from the bottom up: the best sets of each size are kept at each layer.
    """
    top = max(last for _, last in costs)
    by_last: dict[int, list[Group]] = {}
    for group, cost in costs.items():
        if math.isfinite(cost):
            by_last.setdefault(group[1], []).append(group)
    # best[end][fewer]: sets of groups of layers below `end` that leave `fewer` layers fewer.
    best: list[list[list[tuple[float, Groups]]]] = [[[] for _ in range(num_fusions + 1)] for _ in range(top + 2)]
    best[0][0] = [(0.0, ())]
    for end in range(1, top + 2):
        for fewer in range(num_fusions + 1):
            sets = list(best[end - 1][fewer])
            for first, last in by_last.get(end - 1, []):
                rest = fewer - (last - first)
                if rest < 0:
                    continue
                for cost, groups in best[first][rest]:
                    sets.append((cost + costs[first, last], (*groups, (first, last))))
            best[end][fewer] = heapq.nsmallest(count, sets)
    return [groups for _, groups in best[top + 1][num_fusions]]


def propose_sets(
    costs: Mapping[Group, float], trials: Mapping[Groups, float], num_fusions: int, *, count: int
) -> list[Groups]:
    """The `count` sets that are expected to cost least of those that were not tried.

    Costs of groups do not add up: to join one more layer costs more where its neighbours have gone too, and each group
    is fitted to what those below it leave. Ridge regression attributes what tried sets cost beyond the sum of their
    groups to the layers that were joined to the one below, and for every third proposal to the number of groups, too.
    As it learns little from sets that are nearly alike, the first ones that are tried differ.
    """
    corrected = _with_corrections(costs, trials)
    cheapest = cheapest_sets(corrected, num_fusions, count=_CANDIDATES)
    untried = [groups for groups in cheapest if groups not in trials]
    if len(trials) < _DIFFERENT:
        least = max(1, num_fusions // _SHARE)
        tried = [_joined(groups) for groups in trials]
        different = [groups for groups in untried if all(len(_joined(groups) - other) >= least for other in tried)]
        untried = different or untried
    return untried[:count]


def _joined(groups: Groups) -> set[int]:
    """The layers that are joined to the one below."""
    return {layer for first, last in groups for layer in range(first + 1, last + 1)}


def _with_corrections(costs: Mapping[Group, float], trials: Mapping[Groups, float]) -> Mapping[Group, float]:
    """Costs of groups that agree better with those of the sets that were tried.

    On some models every group after the first adds a cost, and a few trials cannot show whether this is one of them.
    Every third proposal therefore assumes so. It is fitted without an intercept, because a single group's cost was
    measured directly.
    """
    finite = [groups for groups, cost in trials.items() if math.isfinite(cost)]
    if not finite:
        return costs
    top = max(last for _, last in costs)
    # 1 where a set joins a layer to the one below, and in the last column its groups beside the first.
    joined = np.zeros((len(finite), top + 2))
    excess = np.zeros(len(finite))  # what a set costs beyond the sum of its groups
    pays_for_groups = len(finite) % _TURNS == _TURNS - 1
    for row, groups in enumerate(finite):
        joined[row, list(_joined(groups))] = 1
        joined[row, -1] = len(groups) - 1 if pays_for_groups else 0
        excess[row] = trials[groups] - sum(costs[group] for group in groups)
    from sklearn.linear_model import Ridge  # as importing it takes memory, which other selections need not

    regression = Ridge(_SHRINKAGE, fit_intercept=not pays_for_groups)
    *of_joins, of_group = regression.fit(joined, excess).coef_.tolist()
    return {
        (first, last): cost + sum(of_joins[first + 1 : last + 1]) + of_group for (first, last), cost in costs.items()
    }
