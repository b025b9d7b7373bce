"""What contiguous groups of layers would cost as one layer each, and which of them together cost least."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lf_hf.config import LONGEST_GROUP
from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer
from lf_hf.progress import progress
from lf_hf.refit.boundaries import Boundaries
from lf_hf.refit.layer_parts import after_attention
from lf_hf.refit.pair_costs import Roles, divergences
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import Traces, on_device

Group = tuple[int, int]
"""The first and the last layer of a group, by their numbers in the dense model."""
FuseGroup = Callable[[int, list[DecoderLayer], Traces, Sequence[Tensor]], DecoderLayer]
"""What a group becomes, from its first layer's number, its layers, their traces, and states before it."""


_JUDGED = slice(
    1, None, 2
)  # tokens: half, as predictions take as long as the layers, and neighbours' say much the same


class GroupCosts:
    """Costs of groups, and of sets of them, as divergences of predictions from the dense model's.

    Groups are fused to some batches of the text, and judged on others.

    Parameters
    ----------
    decoder : Decoder
        The dense model.
    boundaries : Boundaries
        Its states on calibration text.
    roles : Roles
        What the batches of these states are for.
    fuse : FuseGroup
    store : StateStore
    known : dict, optional
        Costs of groups that were measured before, to be taken instead.

    Attributes
    ----------
    by_group : dict
        For each group of two layers or more, never with the first or the last layer of the model, the nats a token that
        it costs by itself; inf where its predictions cannot be computed with.
    tried : dict
        For each set of groups that was tried out whole, what it costs.
    """

    def __init__(
        self,
        decoder: Decoder,
        boundaries: Boundaries,
        roles: Roles,
        fuse: FuseGroup,
        store: StateStore,
        known: dict[Group, float] | None = None,
    ) -> None:
        self._decoder, self._boundaries, self._fuse, self._store = decoder, boundaries, fuse, store
        self._fitting, self._judging = [*roles.fitting, *roles.both], [*roles.both, *roles.judging]
        self._dense = store.keep(state[:, _JUDGED] for state in self._part(decoder.num_layers, self._judging))
        self.tried: dict[tuple[Group, ...], float] = {}
        self.by_group = known or self._measured()

    def best(self, num_fusions: int, *, trials: int) -> list[Group]:
        """The groups that cost least together, where they leave `num_fusions` layers fewer.

        Sets that promise most are tried out whole, then those that differ from the best one by a move, while it helps.
        """
        promising = cheapest_sets(self.by_group, num_fusions, count=max(1, trials // 2))
        for groups in promising:
            self._try(groups)
        while True:
            mine = {groups: cost for groups, cost in self.tried.items() if removed(groups) == num_fusions}
            best = min(mine, key=lambda groups: mine[groups])
            untried = [groups for groups in moved(best, self.by_group) if groups not in self.tried]
            untried.sort(key=lambda groups: sum(self.by_group[group] for group in groups))
            better = False
            for groups in untried[: max(0, trials - len(mine))]:
                if self._try(groups) < mine[best]:
                    better = True
                    break
            if not better:
                return list(best)

    def _part(self, index: int, numbers: Sequence[int]) -> list[Tensor]:
        states = self._boundaries.before(index)
        return [states[number] for number in numbers]

    @torch.no_grad()
    def _measured(self) -> dict[Group, float]:
        """Fuse each group when its last layer comes by, and run what comes out through all layers above."""
        states: dict[Group, Sequence[Tensor]] = {}
        window: dict[int, tuple[DecoderLayer, Sequence[Tensor]]] = {}  # layers, and states after their attention
        upwards = range(1, self._decoder.num_layers)
        bar = progress(upwards, desc="Costs of groups", unit="layer", leave=False)
        for last, layer in zip(bar, self._decoder.layers(upwards), strict=True):
            tokens = _JUDGED if last == upwards[-1] else slice(None)
            for group, before in states.items():
                after = (self._decoder.run_layer(layer, state) for state in before)
                states[group] = self._store.keep(state[:, tokens] for state in after)
            if last == upwards[-1]:
                break
            window[last] = layer, self._residuals(layer, self._part(last, self._fitting))
            window.pop(last - LONGEST_GROUP, None)
            for first in range(min(window), last):
                states[first, last] = self._run(self._fused(first, last, window), self._part(first, self._judging))
        del window
        return dict(zip(states, divergences(self._decoder, self._dense, states.values()), strict=True))

    def _residuals(self, layer: DecoderLayer, states: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._store.keep(after_attention(self._decoder, layer, state) for state in states)

    def _run(self, layer: DecoderLayer, states: Sequence[Tensor]) -> Sequence[Tensor]:
        there = on_device(states, layer, self._store)
        return self._store.keep(self._decoder.run_layer(layer, state) for state in there)

    def _fused(
        self,
        first: int,
        last: int,
        window: Mapping[int, tuple[DecoderLayer, Sequence[Tensor]]],
        states: Sequence[Tensor] | None = None,
    ) -> DecoderLayer:
        """The layer that a group becomes, for `states` before it; by default the dense model's."""
        layers = [window[number][0] for number in range(first, last + 1)]
        store, start = self._store, layers[0]  # where all states come together
        inputs = [on_device(self._part(number, self._fitting), start, store) for number in range(first, last + 2)]
        residuals = [on_device(window[number][1], start, store) for number in range(first, last + 1)]
        traces = Traces(inputs[:-1], residuals, inputs[-1])
        return self._fuse(first, layers, traces, traces.inputs[0] if states is None else states)

    @torch.no_grad()
    def _try(self, groups: tuple[Group, ...]) -> float:
        """Fuse all groups of a set, from the bottom up, and note what that costs."""
        by_first = dict(groups)
        start = min(by_first)
        fitted: Sequence[Tensor] = self._part(start, self._fitting)
        judged: Sequence[Tensor] = self._part(start, self._judging)
        rest = iter(range(start, self._decoder.num_layers))
        layers = self._decoder.layers(range(start, self._decoder.num_layers))
        for first in rest:
            if first not in by_first:
                layer = next(layers)
            else:
                window = {}
                for number in (first, *(next(rest) for _ in range(by_first[first] - first))):
                    of_group = next(layers)
                    window[number] = of_group, self._residuals(of_group, self._part(number, self._fitting))
                layer = self._fused(first, by_first[first], window, fitted)
            fitted, judged = self._run(layer, fitted), self._run(layer, judged)
        [cost] = divergences(self._decoder, self._dense, [[state[:, _JUDGED] for state in judged]])
        self.tried[groups] = cost
        return cost


def removed(groups: Iterable[Group]) -> int:
    """How many layers fewer a model has where each group is one layer."""
    return sum(last - first for first, last in groups)


def cheapest_sets(costs: Mapping[Group, float], num_fusions: int, *, count: int) -> list[tuple[Group, ...]]:
    """Sets of groups that share no layer and leave `num_fusions` layers fewer; those of least summed cost first.

    By dynamic programming from the bottom up, with the `count` best sets of each size kept at each layer.
    """
    top = max(last for _, last in costs)
    best: list[list[list[tuple[float, tuple[Group, ...]]]]] = [
        [[] for _ in range(num_fusions + 1)] for _ in range(top + 2)
    ]
    best[0][0] = [(0.0, ())]  # of layers below 0
    by_last: dict[int, list[Group]] = {}
    for group in costs:
        by_last.setdefault(group[1], []).append(group)
    for end in range(1, top + 2):  # sets in layers below `end`
        for fewer in range(num_fusions + 1):
            found = list(best[end - 1][fewer])
            for group in by_last.get(end - 1, []):
                less = fewer - (group[1] - group[0])
                if less >= 0 and math.isfinite(costs[group]):
                    found += [(cost + costs[group], (*groups, group)) for cost, groups in best[group[0]][less]]
            best[end][fewer] = heapq.nsmallest(count, found)
    return [groups for _, groups in best[top + 1][num_fusions]]


def moved(groups: Sequence[Group], costs: Mapping[Group, float]) -> set[tuple[Group, ...]]:
    """Sets that differ from one by a move and leave as many layers.

    A move cuts a group in two, and joins two neighbours elsewhere, layers or groups. So groups are moved by a layer,
    grow, shrink, split and join.
    """
    found: set[tuple[Group, ...]] = set()
    for group in groups:
        others = [other for other in groups if other != group]
        for cut in range(*group):
            parts = (group[0], cut), (cut + 1, group[1])
            left = [*others, *(part for part in parts if part[0] < part[1])]
            taken = {layer for first, last in left for layer in range(first, last + 1)}
            for first, last in costs:
                inside = [other for other in left if first <= other[0] and other[1] <= last]
                free = all(layer not in taken for layer in range(first, last + 1) if not _within(layer, inside))
                if free and removed(inside) == last - first - 1:
                    found.add(tuple(sorted([*(other for other in left if other not in inside), (first, last)])))
    found.discard(tuple(sorted(groups)))
    return {groups for groups in found if all(math.isfinite(costs[group]) for group in groups)}


def _within(layer: int, groups: Iterable[Group]) -> bool:
    return any(first <= layer <= last for first, last in groups)
