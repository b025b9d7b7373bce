"""What contiguous groups of layers would cost as one layer each, and which of them together cost least."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import divergences
from lf_hf.families import DecoderLayer
from lf_hf.refit.layer_parts import after_attention
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import Boundaries, Traces, on_device
from lf_hf.runtime.progress import progress
from lf_hf.settings import LONGEST_GROUP
from lf_hf.text.packing import beginning

Group = tuple[int, int]
"""The first and the last layer of a group, by their numbers in the dense model."""
FuseGroup = Callable[[int, list[DecoderLayer], Traces, Sequence[Tensor]], DecoderLayer]
"""What a group becomes, from its first layer's number, its layers, their traces, and states before it."""

_TRIALS = 16  # sets of groups that are tried out whole, at most
FINALISTS = 4  # of these, that are compared once more, fitted to more text
GROUP_TOKENS, FINAL_TOKENS = 4096, 16384  # of the calibration text that groups are fitted to, and finalists
JUDGING_PIECES, JUDGING_LENGTH = 16, 128  # sequences that judge single groups, and the tokens of each
JUDGING_SETS = 8  # sequences that judge sets of groups, each as long as it is
_SHRINKAGE = 3.0  # of what joins cost beyond the table, which a dozen trials are to say
# Tokens: half, as predictions take as long as the layers, and neighbours' say much the same.
_JUDGED = slice(1, None, 2)


class _Crossing(NamedTuple):
    """A layer of the dense model, and the model's states before and after it, of text to fit to.

    `residuals` are those between its attention and its MLP, where it is in a group.
    """

    number: int
    layer: DecoderLayer
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    residuals: Sequence[Tensor] = ()


class GroupCosts:
    """Costs of groups, and of sets of them, as divergences of predictions from the dense model's.

    Groups are fitted to some batches of the text, and judged on others: short ones judge single groups, as there are
    many, and long ones whole sets. Little text is unfair to sets of many groups, and to late layers, which need more of
    it: the best few sets are fitted to more, and compared again.

    Parameters
    ----------
    decoder : Decoder
        The dense model.
    boundaries : Boundaries
        Its states on calibration text.
    fitting, judging, judging_sets : sequences of int
        What the batches of these states are for.
    final_text : sequence of int64 tensors of shape (sequences B, tokens T), or None
        What the best few sets are fitted to; None where there is no more than what groups are fitted to.
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
        fitting: Sequence[int],
        judging: Sequence[int],
        judging_sets: Sequence[int],
        final_text: Sequence[Tensor] | None,
        fuse: FuseGroup,
        store: StateStore,
        known: dict[Group, float] | None = None,
    ) -> None:
        self._decoder, self._boundaries, self._fuse, self._store = decoder, boundaries, fuse, store
        self._fitting, self._judging, self._judging_sets = fitting, judging, judging_sets
        self._final_text = final_text
        self.tried: dict[tuple[Group, ...], float] = {}
        self.by_group = known or self._measured()

    def best(self, num_fusions: int, *, trials: int) -> list[Group]:
        """The groups that cost least together, where they leave `num_fusions` layers fewer.

        Raises ValueError if no such set has costs that are finite.
        """
        for _ in progress(range(trials), desc="Trying sets of groups", unit="set", leave=False):
            promised = partial(promising, self.by_group, self.tried, num_fusions)
            groups: tuple[Group, ...] | None = self._decoder.processes.broadcast_object(promised)
            if groups is None:
                break
            [self.tried[groups]] = self._costs_of_sets([groups], self._crossings(groups[0][0]))
        mine = {groups: cost for groups, cost in _finite(self.tried).items() if removed(groups) == num_fusions}
        finalists = heapq.nsmallest(FINALISTS, mine, key=mine.__getitem__)
        if len(finalists) > 1 and self._final_text is not None:
            last = max(groups[-1][1] for groups in finalists)
            costs = self._costs_of_sets(finalists, self._final_crossings(self._final_text, last))
            mine = _finite(dict(zip(finalists, costs, strict=True)))
        if not mine:
            raise ValueError(
                f"No groups of layers that leave {num_fusions} fewer can be computed with in this dtype; use one of "
                "wider range, such as bfloat16, or fewer fusions."
            )
        best = min(mine, key=mine.__getitem__)
        return list(best)

    def _part(self, index: int, numbers: Sequence[int]) -> list[Tensor]:
        states = self._boundaries.before(index)
        return [states[number] for number in numbers]

    @torch.no_grad()
    def _measured(self) -> dict[Group, float]:
        """Fuse each group when its last layer comes by, and run what comes out through all layers above."""
        states: dict[Group, Sequence[Tensor]] = {}
        window: dict[int, _Crossing] = {}
        top = self._decoder.num_layers - 1
        bar = progress(self._crossings(1), total=top, desc="Costs of groups", unit="layer", leave=False)
        for crossing in bar:
            last, tokens = crossing.number, _JUDGED if crossing.number == top else slice(None)
            for group, before in states.items():
                after = (self._decoder.run_layer(crossing.layer, state) for state in before)
                states[group] = self._store.keep(state[:, tokens] for state in after)
            if last == top:
                break
            window[last] = self._traced(crossing)
            window.pop(last - LONGEST_GROUP, None)
            for first in range(min(window), last):
                fused = self._fused([window[number] for number in range(first, last + 1)], window[first].before)
                states[first, last] = self._run(fused, self._part(first, self._judging))
        del window
        return dict(zip(states, self._divergences(self._judging, states.values()), strict=True))

    def _divergences(self, numbers: Sequence[int], found: Iterable[Sequence[Tensor]]) -> list[float]:
        """Of final states of some batches, each of which has the tokens that judge."""
        dense = self._store.keep(state[:, _JUDGED] for state in self._part(self._decoder.num_layers, numbers))
        return divergences(self._decoder, dense, found)

    def _traced(self, crossing: _Crossing) -> _Crossing:
        residuals = (after_attention(self._decoder, crossing.layer, state) for state in crossing.before)
        return crossing._replace(residuals=self._store.keep(residuals))

    def _run(self, layer: DecoderLayer, states: Sequence[Tensor]) -> Sequence[Tensor]:
        there = on_device(states, layer, self._store)
        return self._store.keep(self._decoder.run_layer(layer, state) for state in there)

    def _fused(self, group: Sequence[_Crossing], states: Sequence[Tensor]) -> DecoderLayer:
        """The layer that a group becomes, for `states` before it."""
        layers, store = [crossing.layer for crossing in group], self._store
        start = layers[0]  # where all states come together
        traces = Traces(
            [on_device(crossing.before, start, store) for crossing in group],
            [on_device(crossing.residuals, start, store) for crossing in group],
            on_device(group[-1].after, start, store),
        )
        return self._fuse(group[0].number, layers, traces, on_device(states, start, store))

    def _crossings(self, start: int) -> Iterator[_Crossing]:
        """Of the layers from `start` on, and what groups are fitted to."""
        upwards = range(start, self._decoder.num_layers)
        for number, layer in zip(upwards, self._decoder.layers(upwards), strict=True):
            yield _Crossing(number, layer, self._part(number, self._fitting), self._part(number + 1, self._fitting))

    def _final_crossings(self, text: Sequence[Tensor], last: int) -> Iterator[_Crossing]:
        """Of all layers, with states of some text up to the last layer that is in a group."""
        upwards = range(self._decoder.num_layers)
        before = self._store.keep(self._decoder.embed(text))
        bar = progress(upwards, desc="Comparing sets of groups", unit="layer", leave=False)
        for number, layer in zip(bar, self._decoder.layers(upwards), strict=True):
            after = self._run(layer, before) if number <= last else []
            yield _Crossing(number, layer, before, after)
            before = after

    @torch.no_grad()
    def _costs_of_sets(self, sets: Sequence[tuple[Group, ...]], upwards: Iterable[_Crossing]) -> list[float]:
        """Fuse all groups of each set, from the bottom up, all sets together; what each set costs as a whole."""
        fitted: dict[tuple[Group, ...], Sequence[Tensor]] = {}
        judged: dict[tuple[Group, ...], Sequence[Tensor]] = {}
        window: dict[int, _Crossing] = {}
        for crossing in upwards:
            number = crossing.number
            within = {groups: next((g for g in groups if g[0] <= number <= g[1]), None) for groups in sets}
            if any(within.values()):
                window[number] = self._traced(crossing)
            window.pop(number - LONGEST_GROUP, None)
            for groups, group in within.items():
                if number < groups[0][0]:  # all is as in the dense model
                    continue
                if number == groups[0][0]:
                    fitted[groups], judged[groups] = crossing.before, self._part(number, self._judging_sets)
                layer = crossing.layer
                if group is not None:
                    if number < group[1]:
                        continue
                    layer = self._fused([window[member] for member in range(group[0], number + 1)], fitted[groups])
                if number < groups[-1][1]:  # above its last group nothing is fitted
                    fitted[groups] = self._run(layer, fitted[groups])
                judged[groups] = self._run(layer, judged[groups])
        found = ([state[:, _JUDGED] for state in judged[groups]] for groups in sets)
        return self._divergences(self._judging_sets, found)


def _finite(costs: Mapping[tuple[Group, ...], float]) -> dict[tuple[Group, ...], float]:
    return {groups: cost for groups, cost in costs.items() if math.isfinite(cost)}


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


def cheapest_levels(costs: Mapping[Group, float], most: int) -> list[tuple[float, tuple[Group, ...]]]:
    """For 1 to `most` fusions what the cheapest groups are expected to cost together, and which these are.

    It ends before the first number for which no groups have costs that are finite.
    """
    found = takewhile(bool, (cheapest_sets(costs, count, count=1) for count in range(1, most + 1)))
    return [(sum(costs[group] for group in groups), groups) for [groups] in found]


def promising(
    costs: Mapping[Group, float], tried: Mapping[tuple[Group, ...], float], num_fusions: int
) -> tuple[Group, ...] | None:
    """The set that is expected to cost least of those that were not tried; None where all were.

    Costs of groups do not add up: joining one more layer costs more where its neighbours have gone too. What sets cost
    beyond the sum of their groups is put down to the layers that they join to the one below, by ridge regression.
    """
    known = {groups: cost for groups, cost in tried.items() if removed(groups) == num_fusions}
    finite = list(_finite(known))
    if len(finite) > 1:
        top = max(last for _, last in costs)
        joined = [[_joins(groups, layer) for layer in range(top + 1)] for groups in finite]
        beyond = [known[groups] - sum(costs[group] for group in groups) for groups in finite]
        weights = Ridge(_SHRINKAGE).fit(joined, beyond).coef_
        costs = {(first, last): cost + weights[first + 1 : last + 1].sum() for (first, last), cost in costs.items()}
    found = cheapest_sets(costs, num_fusions, count=len(known) + 1)
    return next((groups for groups in found if groups not in known), None)


def _joins(groups: Iterable[Group], layer: int) -> bool:
    """Whether a layer is in a group with the one below it."""
    return any(first < layer <= last for first, last in groups)


def text_for_groups(text: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """Sequences that candidates are fitted to, and others that judge groups, and sets of them, from all over the text.

    And fourth those that the best few sets are fitted to, if there are more than candidates are fitted to.

    Those are taken that lie at evenly spaced tokens. Where kinds of text take turns, some judge more than others, which
    chooses no worse groups. A single sequence is for all. Of those that judge groups the beginning is enough. Every
    other sequence that judges is half as long and there twice: only the heads that look up what followed before
    predict the second time, and no other text shows as clearly where they are lost.
    """
    ends = np.cumsum([len(sequence) for sequence in text])
    points = (np.arange(JUDGING_PIECES) + 0.5) * ends[-1] / JUDGING_PIECES
    chosen = sorted(set(np.searchsorted(ends, points, side="right").tolist()))
    if sum(len(text[number]) for number in chosen) > ends[-1] / 2:
        chosen = chosen[1::2] or chosen
    rest = [sequence for number, sequence in enumerate(text) if number not in chosen]
    wholes = [text[number] for number in chosen]
    pieces = [whole[:JUDGING_LENGTH] for whole in wholes]
    some = wholes[:: max(1, len(wholes) // JUDGING_SETS)]
    fitting, final = (beginning(rest or text, tokens) for tokens in (GROUP_TOKENS, FINAL_TOKENS))
    return fitting, _half_twice(pieces), _half_twice(some), final if len(final) > len(fitting) else []


def _half_twice(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Sequences, of every other one the first half two times."""
    return [
        torch.cat([sequence[: len(sequence) // 2]] * 2) if number % 2 else sequence
        for number, sequence in enumerate(sequences)
    ]


def num_trials(num_fusions: int) -> int:
    """How many sets of groups are tried out whole: a few where there are few groups in a set."""
    return min(_TRIALS, 4 * num_fusions)
