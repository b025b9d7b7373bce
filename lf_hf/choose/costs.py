"""What groups of layers cost: how far they move the model's predictions, each made one layer by a rough fit.

The divergence of predictions from the dense model's is taken on short pieces of several kinds of text, to which nothing
is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder, Group, Groups
from lf_hf.families.table import DecoderLayer
from lf_hf.measure.dense import CalibrationText
from lf_hf.measure.predictions import divergences
from lf_hf.refit.fit import fit_group
from lf_hf.refit.layer_parts import build_layer, mid_state
from lf_hf.refit.regression import FitOverflow
from lf_hf.refit.states import States, StateStore, run_boundaries, run_states
from lf_hf.refit.traces import gather
from lf_hf.runtime.amounts import JUDGED_AT_ONCE, JUDGING_LENGTH, JUDGING_PART, JUDGING_PIECES, judged_stride
from lf_hf.runtime.launch import ALONE, Processes
from lf_hf.runtime.progress import progress

T = TypeVar("T")
_LAYERS_OF_A_FIT = 16  # that what judges runs through in the time that a rough fit takes for a layer of a group


class GroupText(NamedTuple):
    """Sequences that groups are fitted to, and pieces that judge them: int64 tensors of shape (tokens T,).

    Those of `judging_groups` judge groups by themselves, and with those of `judging_sets` they judge sets of groups.
    """

    fitting: list[Tensor]
    judging_groups: list[Tensor]
    judging_sets: list[Tensor]


def split_text(calibration: CalibrationText, num_fitted: int) -> GroupText:
    """Divide calibration text into `num_fitted` tokens for fits and what judges groups, beside text of other kinds.

    Text that the model wrote is not used for judging: it hardly shows the loss of layers that real text needs. A single
    given sequence serves both uses. Every other piece is a half that is repeated: only heads that look up what
    followed before can predict the repeat, and no other text shows the loss of those heads as clearly.
    """
    judges, rest = calibration.hold_out(JUDGING_PIECES, at_random=False)
    text = GroupText(rest.first(num_fitted), [], [])
    for number, sequence in enumerate([*(judges or calibration.given), *calibration.other]):
        piece = sequence[:JUDGING_LENGTH]
        if number % 2:
            piece = torch.cat([piece[: len(piece) // 2]] * 2)
        judges_groups = number // 2 % JUDGING_PART == 0  # of neighbours one is a repeated half
        (text.judging_groups if judges_groups else text.judging_sets).append(piece)
    return text


def share_groups(groups: Collection[Group], num_layers: int, count: int) -> list[list[Group]]:
    """Groups of the layers of a model in `count` shares that take about the same time to measure."""

    def load(group: Group) -> int:
        first, last = group
        return _LAYERS_OF_A_FIT * (last - first + 1) + num_layers - last

    shares: list[list[Group]] = [[] for _ in range(count)]
    loads = [0] * count
    for group in sorted(groups, key=lambda group: (load(group), group), reverse=True):
        least = loads.index(min(loads))
        shares[least].append(group)
        loads[least] += load(group)
    return shares


class _TracedLayer(NamedTuple):
    """A layer of the dense model, and its states of the text that groups are fitted to."""

    number: int
    layer: DecoderLayer
    before: States
    mid_states: States  # between attention and MLP; none of a layer that is in no group
    after: States


class GroupCosts:
    """Measures costs of groups, and of sets of them, in nats a token.

    Processes of a launch each measure some of them, on all of the text. So costs are those that one process alone
    finds, up to rounding, and all processes have the same.

    Parameters
    ----------
    decoder : Decoder
        The dense model, by itself in each process.
    processes : Processes
    boundaries : sequence of States
        Before each of its layers and after the last one: batches of each text of a `GroupText`, in its order.
    num_fitting, num_judging : int
        How many of the batches are to fit to, and how many of the next ones judge groups by themselves.
    ridge : float
        Of the fits.
    store : StateStore

    Attributes
    ----------
    by_group : dict
        Costs of groups that were measured, to which those of another computation may be added. They are inf where
        predictions cannot be computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        processes: Processes,
        boundaries: Sequence[States],
        num_fitting: int,
        num_judging: int,
        ridge: float,
        store: StateStore,
    ) -> None:
        self.decoder = decoder
        self.processes = processes
        self.boundaries = boundaries
        self.by_group: dict[Group, float] = {}
        self._fitting = slice(num_fitting)
        self._judging_groups = slice(num_fitting, num_fitting + num_judging)
        self._judging_sets = slice(num_fitting, None)
        self._ridge = ridge
        self._store = store
        self._states_above: dict[Groups, tuple[States, States]] = {}  # above the groups that tried sets begin with
        self._judged_tokens = slice(1, None, judged_stride(decoder.config.vocab_size))

    @torch.no_grad()
    def measure(self, groups: Collection[Group]) -> None:
        """Measure what each of some groups costs by itself.

        Costs by themselves only propose sets, so less text judges than in `measure_sets`.
        """
        share = share_groups(groups, self.decoder.num_layers, self.processes.world_size)[self.processes.rank]
        self.by_group |= self._of_all(partial(self._measure_in_one_pass, share))

    def _measure_in_one_pass(self, groups: Sequence[Group]) -> dict[Group, float]:
        """Costs of groups by themselves, in one pass through the layers.

        A group is fused when its last layer comes by, and what comes out runs through all layers above.
        """
        costs: dict[Group, float] = {}
        judged: dict[Group, States] = {}
        window: dict[int, _TracedLayer] = {}
        start = min((first for first, _ in groups), default=self.decoder.num_layers)
        layers = self._traced_layers(groups, start)
        total = self.decoder.num_layers - start
        for traced in progress(layers, total=total, desc="Costs of groups", unit="layer", leave=False):
            number = traced.number
            for group, states in judged.items():
                judged[group] = self._run(traced.layer, states)
            window[number] = traced
            for first in sorted(first for first, last in groups if last == number):
                fused = self._fuse([window[n] for n in range(first, number + 1)], states=None)
                if fused is None:
                    costs[first, number] = math.inf
                else:
                    judged[first, number] = self._run(fused, self._dense(first, self._judging_groups))
            open_starts = [first for first, last in groups if first <= number < last]
            lowest_open = min(open_starts, default=number + 1)
            window = {n: layer for n, layer in window.items() if n >= lowest_open}
        measured = list(judged)
        for start in range(0, len(measured), JUDGED_AT_ONCE):
            batch = measured[start : start + JUDGED_AT_ONCE]
            found = self._divergences([judged.pop(group) for group in batch], self._judging_groups)
            costs.update(zip(batch, found, strict=True))
        return costs

    @torch.no_grad()
    def measure_sets(self, sets: Sequence[Groups]) -> dict[Groups, float]:
        """What each of some sets costs as a whole."""
        share = self.processes.shard(sets)
        return self._of_all(lambda: {groups: self._measure_set(groups) for groups in share})

    def _of_all(self, measure: Callable[[], dict[T, float]]) -> dict[T, float]:
        """Costs of what each process measures a share of."""
        with self.processes.apart():
            measured = measure()
        costs: dict[T, float] = {}
        for found in self.processes.all_gather_object(measured):
            costs |= found
        return costs

    def _measure_set(self, groups: Groups) -> float:
        """What a set costs as a whole, with its groups fused from the bottom up; inf where a fit overflows."""
        first_layer, fitted, judged = self._states_below(groups)
        ends = dict(groups)
        window: list[_TracedLayer] = []
        for traced in self._traced_layers(groups, first_layer):
            number, layer = traced.number, traced.layer
            first = window[0].number if window else number
            if first in ends:
                window.append(traced)
                if number < ends[first]:
                    continue
                is_lowest = first == groups[0][0]
                fused = self._fuse(window, states=None if is_lowest else fitted)
                if fused is None:
                    return math.inf
                layer = fused
                window.clear()
            if number < groups[-1][1]:  # above the last group nothing is fitted
                fitted = self._run(layer, fitted)
            judged = self._run(layer, judged)
            if first in ends:
                fused_groups = tuple(group for group in groups if group[0] <= first)
                self._states_above[fused_groups] = fitted, judged
        return self._divergences([judged], self._judging_sets)[0]

    def _states_below(self, groups: Groups) -> tuple[int, States, States]:
        """The first layer to run for a set, and states before it: above the groups that a set before it began with."""
        alike = [fused for fused in self._states_above if fused == groups[: len(fused)]]
        if not alike:
            start = groups[0][0]
            return start, self._dense(start, self._fitting), self._dense(start, self._judging_sets)
        longest = max(alike, key=len)
        return longest[-1][1] + 1, *self._states_above[longest]

    def _dense(self, boundary: int, batches: slice) -> States:
        """The dense model's states of some text at a boundary."""
        states = self.boundaries[boundary]
        return [states[number] for number in range(len(states))[batches]]

    def _traced_layers(self, groups: Iterable[Group], start: int) -> Iterator[_TracedLayer]:
        """The layers from `start` up to the last one of the model."""
        grouped = {number for first, last in groups for number in range(first, last + 1)}
        numbers = range(start, self.decoder.num_layers)
        for number, layer in zip(numbers, self.decoder.layers(numbers), strict=True):
            before = self._dense(number, self._fitting)
            mid_states: States = []
            if number in grouped:
                mid_states = self._store.keep(mid_state(self.decoder, layer, state) for state in before)
            yield _TracedLayer(number, layer, before, mid_states, self._dense(number + 1, self._fitting))

    def _fuse(self, group: Sequence[_TracedLayer], states: States | None) -> DecoderLayer | None:
        """The layer that a group becomes by a rough fit; None where it overflows. `states` are as in `trace`."""
        layers = [traced.layer for traced in group]
        before = group[0].before
        streams = zip(*(traced.before for traced in group), group[-1].after, strict=True)
        passes = zip(streams, zip(*(traced.mid_states for traced in group), strict=True), strict=True)
        tokens = sum(state.shape[:2].numel() for state in before)
        traces = gather(self.decoder, layers, passes, states, self._store, rough_tokens=tokens)
        states = before if states is None else states
        try:
            fit = fit_group(self.decoder, layers, traces, states, self._store, ridge=self._ridge, rough=True)
        except FitOverflow:
            return None
        return build_layer(self.decoder, fit.weights, fit.kind)

    def _run(self, layer: DecoderLayer, states: States) -> States:
        return run_states(self.decoder, layer, states, self._store)

    def _divergences(self, candidates: Sequence[States], text: slice) -> list[float]:
        """Divergences from the dense model's predictions, by final states of some text."""
        dense = [state[:, self._judged_tokens] for state in self._dense(self.decoder.num_layers, text)]
        judged = [[state[:, self._judged_tokens] for state in states] for states in candidates]
        return divergences(self.decoder, dense, judged)


@contextmanager
def costs_on(decoder: Decoder, text: GroupText, ridge: float) -> Iterator[GroupCosts]:
    """Costs of groups of the dense model's layers, which can be measured on a text inside a `with` block."""
    alone = decoder.copy()
    alone.processes = ALONE
    fitting, judging_groups, judging_sets = map(alone.make_batches, text)
    embedded = alone.embed([*fitting, *judging_groups, *judging_sets])
    with StateStore(alone.states, alone.scratch) as store:
        boundaries = list(run_boundaries(alone, embedded, store))
        yield GroupCosts(alone, decoder.processes, boundaries, len(fitting), len(judging_groups), ridge, store)
