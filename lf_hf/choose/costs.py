"""What groups of layers cost: how far they move the model's predictions, each made one layer roughly.

The divergence of predictions from the dense model's is taken on short pieces of several kinds of text, to which nothing
is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder, Group, Groups
from lf_hf.families.table import DecoderLayer
from lf_hf.measure.dense import CalibrationText
from lf_hf.measure.predictions import divergences
from lf_hf.refit.layer_parts import build_layer, mid_state
from lf_hf.refit.regression import FitError
from lf_hf.refit.states import States, keep, run_boundaries, run_states
from lf_hf.refit.traces import trace
from lf_hf.report.data import MadeLayer
from lf_hf.runtime.amounts import (
    JUDGED_AT_ONCE,
    JUDGING_LENGTH,
    JUDGING_PART,
    JUDGING_PIECES,
    OUT_OF_DOMAIN_TOKENS,
    judged_stride,
)
from lf_hf.runtime.progress import progress


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


def num_pieces(given: float, length: int) -> int:
    """How many pieces judge, at most, where so many tokens are given in sequences of `length`: half of these, and those
    of two other kinds of text."""
    return min(JUDGING_PIECES, int(given) // length // 2) + 2 * OUT_OF_DOMAIN_TOKENS // JUDGING_LENGTH


_Traced = tuple[DecoderLayer, States]
"""A layer of the dense model, and its states of the text to fit to between attention and MLP."""


class _Front(NamedTuple):
    """How far a set of groups has come in a pass through the layers: the next layer, and states in front of it.

    These are of the text to fit to and of what judges, and empty as long as they are the dense model's.
    """

    layer: int
    fitted: States
    judged: States


class GroupCosts:
    """Measures costs of groups, and of sets of them, in nats a token.

    `roughly` makes one layer of layers, their traces and states in front of them, as `fit_group` does.
    """

    decoder: Decoder  # the dense model
    boundaries: list[States]  # all text before each of its layers and after the last one
    by_group: dict[Group, float]
    """Costs of groups that were measured, to which those of another computation may be added. They are inf where
    predictions cannot be computed."""

    def __init__(self, decoder: Decoder, text: GroupText, roughly: Callable[..., MadeLayer]) -> None:
        self.decoder = decoder
        batches = [self.decoder.make_batches(sequences) for sequences in text]
        num_fitting, num_judging, _ = map(len, batches)
        embedded = self.decoder.embed(list(chain(*batches)))
        self.boundaries = list(run_boundaries(self.decoder, embedded))
        self.by_group: dict[Group, float] = {}
        self._fitting = slice(num_fitting)
        self._judging_groups = slice(num_fitting, num_fitting + num_judging)
        self._judging_sets = slice(num_fitting, None)
        self._rough_tokens = sum(map(len, text.fitting))
        self._roughly = roughly
        self._fronts: dict[Groups, _Front] = {}  # above the groups that measured sets begin with
        self._judged_tokens = slice(1, None, judged_stride(decoder.config.vocab_size))

    def measure(self, groups: Collection[Group]) -> None:
        """Measure what each of some groups costs by itself.

        Costs by themselves only propose sets, so less text judges than in `measure_set`.
        """
        costs = self._measure([(group,) for group in sorted(groups)], self._judging_groups)
        self.by_group |= {group: cost for (group,), cost in costs.items()}

    def measure_set(self, groups: Groups) -> float:
        """What a set costs as a whole."""
        return self._measure([groups], self._judging_sets)[groups]

    @torch.no_grad()
    def _measure(self, sets: Sequence[Groups], text: slice) -> dict[Groups, float]:
        """What sets cost by their predictions of some text, in one pass through the layers; inf where a fit overflows.

        A group is fused when its last layer comes by, and what comes out runs through the layers above.
        """
        costs: dict[Groups, float] = {}
        fronts = {groups: self._known_front(groups) for groups in sets}
        grouped = {number for first, last in chain(*sets) for number in range(first, last + 1)}
        traced: dict[int, _Traced] = {}
        start = min((front.layer for front in fronts.values()), default=self.decoder.num_layers)
        numbers = range(start, self.decoder.num_layers)
        layers = zip(numbers, self.decoder.layers(numbers), strict=True)
        what = "Costs of groups" if text is self._judging_groups else "Costs of a set"
        for number, layer in progress(layers, total=len(numbers), desc=what, unit="layer", leave=False):
            if number in grouped:
                dense = self._dense(number, self._fitting)
                traced[number] = layer, keep(self.decoder, (mid_state(self.decoder, layer, state) for state in dense))
            for groups, front in list(fronts.items()):
                if number < dict(groups).get(front.layer, front.layer):
                    continue
                try:
                    fronts[groups] = self._pass(groups, front, number, layer, traced, text)
                except FitError:
                    costs[groups] = math.inf
                    del fronts[groups]
            if not fronts:
                break
            lowest = min(front.layer for front in fronts.values())
            traced = {n: held for n, held in traced.items() if n >= lowest}
        measured = list(fronts)
        for first in range(0, len(measured), JUDGED_AT_ONCE):
            batch = measured[first : first + JUDGED_AT_ONCE]
            found = self._divergences([fronts.pop(groups).judged for groups in batch], text)
            costs.update(zip(batch, found, strict=True))
        return costs

    def _known_front(self, groups: Groups) -> _Front:
        """Where to begin with a set: above the groups that a set before it began with, or else at its first one."""
        alike = [begun for begun in self._fronts if len(begun) < len(groups) and begun == groups[: len(begun)]]
        return self._fronts[max(alike, key=len)] if alike else _Front(groups[0][0], [], [])

    def _pass(
        self,
        groups: Groups,
        front: _Front,
        number: int,
        layer: DecoderLayer,
        traced: Mapping[int, _Traced],
        text: slice,
    ) -> _Front:
        """Bring a set above layer `number`, the last one of its next group or one that is in none."""
        first, fitted, judged = front
        if first < number:
            layer = self._fuse(first, [traced[n] for n in range(first, number + 1)], fitted)
        above: States = []
        if number < groups[-1][1]:  # above the last group nothing is fitted
            above = run_states(self.decoder, layer, fitted or self._dense(first, self._fitting))
        new = _Front(number + 1, above, run_states(self.decoder, layer, judged or self._dense(first, text)))
        is_group, is_last = first < number, number == groups[-1][1]
        if is_group and not is_last:
            self._fronts[tuple(group for group in groups if group[0] <= first)] = new
        return new

    def _fuse(self, first: int, group: Sequence[_Traced], fitted: States) -> DecoderLayer:
        """The layer that a group becomes roughly, on states in front of it unless they are the dense model's."""
        layers = [layer for layer, _ in group]
        stream = [self._dense(first, self._fitting)]
        for number, (_, mid_states) in enumerate(group, first + 1):
            stream += [mid_states, self._dense(number, self._fitting)]
        passes = zip(*stream, strict=True)
        traces = trace(self.decoder, layers, passes, fitted or None, rough_tokens=self._rough_tokens)
        made = self._roughly(self.decoder, layers, traces, fitted or stream[0])
        return build_layer(self.decoder, made.weights, made.kind)

    def _dense(self, boundary: int, batches: slice) -> States:
        """The dense model's states of some text at a boundary."""
        states = self.boundaries[boundary]
        return [states[number] for number in range(len(states))[batches]]

    def _divergences(self, candidates: Sequence[States], text: slice) -> list[float]:
        """Divergences from the dense model's predictions, by final states of some text."""
        dense = [state[:, self._judged_tokens] for state in self._dense(self.decoder.num_layers, text)]
        judged = [[state[:, self._judged_tokens] for state in states] for states in candidates]
        return divergences(self.decoder, dense, judged)
