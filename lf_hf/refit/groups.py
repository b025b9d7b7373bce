"""Which groups of adjacent layers become one layer each: those that together move the model's predictions least.

What a group costs is measured: it is made one layer by a rough fit, and the divergence of predictions from the dense
model's is taken on short pieces of several kinds of text. All groups of two and of three layers are measured. What
longer ones cost is estimated from these, and measured where they are in one of the cheapest sets. Of such sets some are
tried out whole.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import divergences
from lf_hf.families import DecoderLayer
from lf_hf.refit.fit import FitOverflow
from lf_hf.refit.layer_parts import mid_state
from lf_hf.refit.states import Boundaries, StateStore, Traces, on_device
from lf_hf.runtime.progress import progress
from lf_hf.settings import LONGEST_GROUP
from lf_hf.text.packing import JUDGING_LENGTH, beginning, held_out, interleaved

Group = tuple[int, int]
"""The first and the last layer of a group, by their numbers in the dense model."""
Groups = tuple[Group, ...]
"""Groups that share no layer, in ascending order."""
FuseGroup = Callable[[int, list[DecoderLayer], Traces, Sequence[Tensor]], DecoderLayer]
"""What a group becomes, from its first layer's number, its layers, their traces, and states before it."""

SHORT = 2  # layers that groups leave fewer of which all are measured
_TRIALS = 16  # sets of groups that are tried out whole, at most
_FAR = 2.0  # times what its groups cost one by one: a set that costs more is not trusted, and others are tried
_NEAR = 0.15  # of what the best set costs: sets that cost no more above it may be the best in better fits
_AT_ONCE = 8  # groups whose predictions are in memory at a time
_AHEAD = 3  # sets whose groups are measured in one pass through the layers
_GROUP_TOKENS = 4096  # of the calibration text that groups are fitted to
_JUDGING_PIECES = 16  # of the calibration text that judge, beside other kinds of text
_JUDGED_LOGITS = 1 << 27  # of a candidate that are compared, about: of a large vocabulary, those of fewer tokens
_SHRINKAGE = 3.0  # of what joins cost beyond their groups, which a few trials are to say


class _TracedLayer(NamedTuple):
    """A layer of the dense model, and the model's states before and after it, of text to fit to.

    `mid_states` are those between its attention and its MLP, where it is in a group.
    """

    number: int
    layer: DecoderLayer
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    mid_states: Sequence[Tensor] = ()


class GroupCosts:
    """Costs of groups, and of sets of them, as divergences of predictions from the dense model's.

    Parameters
    ----------
    decoder : Decoder
        The dense model.
    boundaries : Boundaries
        Its states on calibration text.
    fitting, judging : sequences of int
        The batches of these states that groups are fitted to, and those that judge them.
    fuse : FuseGroup
    store : StateStore
    by_group : dict
        Costs of groups that were measured before; those that are measured are added.

    Attributes
    ----------
    by_group : dict
        For each group that was measured, which never has the first or the last layer of the model, the nats a token
        that it costs by itself; inf where its predictions cannot be computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        boundaries: Boundaries,
        fitting: Sequence[int],
        judging: Sequence[int],
        fuse: FuseGroup,
        store: StateStore,
        by_group: dict[Group, float],
    ) -> None:
        self._decoder, self._boundaries, self._fuse, self._store = decoder, boundaries, fuse, store
        self._fitting, self._judging, self.by_group = fitting, judging, by_group
        self._begun: dict[Groups, tuple[Sequence[Tensor], Sequence[Tensor]]] = {}  # states above groups of the last set
        tokens = sum(state.shape[:2].numel() for state in self._part(0, judging))  # of this process
        stride = sum(decoder.processes.all_gather_object(tokens)) * decoder.config.vocab_size // _JUDGED_LOGITS
        self._judged = slice(1, None, min(max(2, stride), 8))  # neighbours' predictions say much the same

    def best(self, num_fusions: int) -> list[Groups]:
        """The set that costs least of those that leave `num_fusions` layers fewer, and those that may yet be better.

        These cost little more: the next one, and the best of more groups, as rough fits to little text are the worse
        the more groups there are.

        Raises ValueError if no set has costs that are finite.
        """
        tried: dict[Groups, float] = {}
        promised = math.inf
        for trial in progress(range(_TRIALS), desc="Trying sets of groups", unit="set", leave=False):
            if trial >= 3 * num_fusions and min(tried.values()) <= _FAR * promised:
                break
            groups = self._next(tried, num_fusions)
            if groups is None:
                break
            tried[groups] = self.by_group[groups[0]] if len(groups) == 1 else self._cost_of_set(groups)
            promised = min(promised, sum(self.by_group[group] for group in groups))
        computed = sorted((groups for groups in tried if math.isfinite(tried[groups])), key=tried.__getitem__)
        if not computed:
            raise ValueError(
                f"No groups of layers that leave {num_fusions} fewer can be computed with in this dtype; use one of "
                "wider range, such as bfloat16, or fewer fusions."
            )
        least = tried[computed[0]]
        near = [groups for groups in computed if tried[groups] - least <= _NEAR * abs(least)]
        most = max(map(len, near[:2]))
        return [*near[:2], *[groups for groups in near[2:] if len(groups) > most][:1]]

    def _next(self, tried: Mapping[Groups, float], num_fusions: int) -> Groups | None:
        """The set to try next; costs of its groups are measured. None where no set is left."""
        top = self._decoder.num_layers - 2
        short = [(n, n + more) for more in range(1, min(num_fusions, SHORT) + 1) for n in range(1, top + 1 - more)]
        missing: Collection[Group] = set(short) - self.by_group.keys()
        while True:
            if missing:
                self._measure(missing)
            longest = longest_group(self._decoder.num_layers, num_fusions)
            choose = partial(promising, estimated(self.by_group, longest), tried, num_fusions, count=_AHEAD)
            sets: list[Groups] = self._decoder.processes.broadcast_object(choose)
            if not sets:
                return None
            if self.by_group.keys() >= set(sets[0]):
                return sets[0]
            missing = {group for groups in sets for group in groups} - self.by_group.keys()

    def _part(self, index: int, numbers: Sequence[int]) -> list[Tensor]:
        states = self._boundaries.before(index)
        return [states[number] for number in numbers]

    @torch.no_grad()
    def _measure(self, groups: Collection[Group]) -> None:
        """Fuse each group when its last layer comes by, and run what comes out through all layers above."""
        states: dict[Group, Sequence[Tensor]] = {}
        window: dict[int, _TracedLayer] = {}
        for traced in self._traced_layers(min(groups)[0], "Costs of groups"):
            number = traced.number
            for group, before in states.items():
                states[group] = self._run(traced.layer, before)
            if any(first <= number <= last for first, last in groups):
                window[number] = self._with_mid_states(traced)
            for first in sorted(first for first, last in groups if last == number):
                try:
                    fused = self._fused([window[n] for n in range(first, number + 1)], window[first].before)
                except FitOverflow:
                    self.by_group[first, number] = math.inf
                    continue
                states[first, number] = self._run(fused, self._part(first, self._judging))
            needed = {n for first, last in groups if first <= number < last for n in range(first, last)}
            window = {n: of_layer for n, of_layer in window.items() if n in needed}
        made = list(states)
        for some in (made[n : n + _AT_ONCE] for n in range(0, len(made), _AT_ONCE)):
            costs = self._divergences([states.pop(group) for group in some])
            self.by_group |= dict(zip(some, costs, strict=True))

    @torch.no_grad()
    def _cost_of_set(self, groups: Groups) -> float:
        """What a set costs as a whole, with its groups fused from the bottom up."""
        start, ends = groups[0][0], dict(groups)
        fitted: Sequence[Tensor] = self._part(start, self._fitting)
        judged: Sequence[Tensor] = self._part(start, self._judging)
        begun = {made: states for made, states in self._begun.items() if made == groups[: len(made)]}
        if begun:  # with the same groups as the set before
            made, (fitted, judged) = max(begun.items())
            start = made[-1][1] + 1
        window: list[_TracedLayer] = []
        for traced in self._traced_layers(start):
            first, layer = window[0].number if window else traced.number, traced.layer
            if first in ends:
                window.append(self._with_mid_states(traced))
                if traced.number < ends[first]:
                    continue
                try:
                    layer = self._fused(window, fitted)
                except FitOverflow:
                    return math.inf
                window.clear()
            if traced.number < groups[-1][1]:  # above its last group nothing is fitted
                fitted = self._run(layer, fitted)
            judged = self._run(layer, judged)
            if first in ends:
                begun[tuple(group for group in groups if group[0] <= first)] = fitted, judged
        self._begun = begun
        [cost] = self._divergences([judged])
        return cost

    def _divergences(self, candidates: Iterable[Sequence[Tensor]]) -> list[float]:
        """Of final states of the text that judges."""
        dense, *judged = (
            [state[:, self._judged] for state in states]
            for states in (self._part(self._decoder.num_layers, self._judging), *candidates)
        )
        return divergences(self._decoder, dense, judged)

    def _with_mid_states(self, traced: _TracedLayer) -> _TracedLayer:
        mid_states = (mid_state(self._decoder, traced.layer, state) for state in traced.before)
        return traced._replace(mid_states=self._store.keep(mid_states))

    def _run(self, layer: DecoderLayer, states: Sequence[Tensor]) -> Sequence[Tensor]:
        there = on_device(states, layer, self._store)
        return self._store.keep(self._decoder.run_layer(layer, state) for state in there)

    def _fused(self, group: Sequence[_TracedLayer], states: Sequence[Tensor]) -> DecoderLayer:
        """The layer that a group becomes, for `states` before it."""
        layers, store = [traced.layer for traced in group], self._store
        start = layers[0]  # where all states come together
        traces = Traces(
            [on_device(traced.before, start, store) for traced in group],
            [on_device(traced.mid_states, start, store) for traced in group],
            on_device(group[-1].after, start, store),
        )
        return self._fuse(group[0].number, layers, traces, on_device(states, start, store))

    def _traced_layers(self, start: int, desc: str | None = None) -> Iterator[_TracedLayer]:
        """Of the layers from `start` on, and what groups are fitted to."""
        upwards = range(start, self._decoder.num_layers)
        numbers = progress(upwards, desc=desc, unit="layer", leave=False) if desc else upwards
        for number, layer in zip(numbers, self._decoder.layers(upwards), strict=True):
            yield _TracedLayer(number, layer, self._part(number, self._fitting), self._part(number + 1, self._fitting))


def removed(groups: Iterable[Group]) -> int:
    """How many layers fewer a model has where each group is one layer."""
    return sum(last - first for first, last in groups)


def longest_group(num_layers: int, num_fusions: int) -> int:
    """How many layers become one, at most."""
    return max(LONGEST_GROUP, math.ceil((num_layers - 2) / (num_layers - 2 - num_fusions)))


def estimated(measured: Mapping[Group, float], longest: int = LONGEST_GROUP) -> dict[Group, float]:
    """Costs of all groups of up to `longest` layers, where those of all pairs of layers were measured.

    A group that was not measured costs what it does without its last layer and without its first one, less what all
    between these two cost, which is in both.
    """
    costs, top = dict(measured), max(last for _, last in measured)
    for longer in range(2, longest):
        for first in range(1, top + 1 - longer):
            last = first + longer
            if (first, last) not in costs:
                parts = costs[first, last - 1] + costs[first + 1, last]
                common = costs.get((first + 1, last - 1), 0.0)  # one layer costs nothing
                costs[first, last] = parts - common if math.isfinite(parts) else math.inf
    return costs


def cheapest_sets(costs: Mapping[Group, float], num_fusions: int, *, count: int) -> list[Groups]:
    """Sets of groups that leave `num_fusions` layers fewer; those of least summed cost first.

    By dynamic programming from the bottom up, with the `count` best sets of each size kept at each layer.
    """
    top = max(last for _, last in costs)
    best: list[list[list[tuple[float, Groups]]]] = [[[] for _ in range(num_fusions + 1)] for _ in range(top + 2)]
    best[0][0] = [(0.0, ())]  # of layers below 0
    by_last: dict[int, list[Group]] = {}
    for group in costs:
        by_last.setdefault(group[1], []).append(group)
    for end in range(1, top + 2):  # sets in layers below `end`
        for fewer in range(num_fusions + 1):
            sets = list(best[end - 1][fewer])
            for group in by_last.get(end - 1, []):
                less = fewer - (group[1] - group[0])
                if less >= 0 and math.isfinite(costs[group]):
                    sets += [(cost + costs[group], (*groups, group)) for cost, groups in best[group[0]][less]]
            best[end][fewer] = heapq.nsmallest(count, sets)
    return [groups for _, groups in best[top + 1][num_fusions]]


def cheapest_levels(costs: Mapping[Group, float], most: int) -> list[float]:
    """For 1 to `most` fusions what the cheapest groups are expected to cost together.

    It ends before the first number for which no groups have costs that are finite.
    """
    levels = takewhile(bool, (cheapest_sets(costs, count, count=1) for count in range(1, most + 1)))
    return [sum(costs[group] for group in groups) for [groups] in levels]


def promising(
    costs: Mapping[Group, float], tried: Mapping[Groups, float], num_fusions: int, *, count: int
) -> list[Groups]:
    """The sets that are expected to cost least of those that were not tried, `count` of them at most.

    Costs of groups do not add up: joining one more layer costs more where its neighbours have gone too. What sets cost
    beyond the sum of their groups is put down to the layers that they join to the one below, by ridge regression.
    """
    finite = [groups for groups, cost in tried.items() if math.isfinite(cost)]
    if len(finite) > 1:
        top = max(last for _, last in costs)
        joined = [[_joins(groups, layer) for layer in range(top + 1)] for groups in finite]
        beyond = [tried[groups] - sum(costs[group] for group in groups) for groups in finite]
        weights = Ridge(_SHRINKAGE).fit(joined, beyond).coef_
        costs = {(first, last): cost + weights[first + 1 : last + 1].sum() for (first, last), cost in costs.items()}
    cheapest = cheapest_sets(costs, num_fusions, count=len(tried) + count)
    return [groups for groups in cheapest if groups not in tried][:count]


def _joins(groups: Iterable[Group], layer: int) -> bool:
    """Whether a layer is in a group with the one below it."""
    return any(first < layer <= last for first, last in groups)


def text_for_groups(
    given: Sequence[Tensor], written: Sequence[Tensor], other_text: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences that groups are fitted to, and pieces that judge them: of other sequences, and of other kinds of text.

    What the model writes judges nothing: it hardly shows where layers are lost that real text needs. Only a given text
    of one sequence is for both. Every other piece is half as long and there twice: only the heads that look up what
    followed before predict the second time, and no other text shows as clearly where they are lost.

    Parameters
    ----------
    given, written, other_text : sequences of int64 tensors of shape (tokens T,)
    """
    chosen, rest = held_out(given, _JUDGING_PIECES, at_random=False)
    pieces = [sequence[:JUDGING_LENGTH] for sequence in (*(chosen or given), *other_text)]
    judging = [torch.cat([piece[: len(piece) // 2]] * 2) if n % 2 else piece for n, piece in enumerate(pieces)]
    return list(beginning(interleaved(rest, written), _GROUP_TOKENS)), judging
