"""How far the model's predictions would move with each pair of layers fused, kept up to date while layers are fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lf_hf.decoder.influence import divergence
from lf_hf.decoder.interface import Decoder
from lf_hf.progress import progress
from lf_hf.refit.boundaries import Boundaries
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.states import StateStore
from lf_hf.refit.traces import on_device

_ROWS = 64  # tokens whose predictions are compared at a time
JUDGING_STRIDE = 4
"""Every fourth sequence judges fused layers; those are fitted to one half of these and to all other sequences.

A layer that is fitted to little text overfits: it looks too good on that text, and too bad on any other. One that is
fitted to much text, as in the last pass, lies between.
"""


def num_judging_copies(num_layers: int) -> int:
    """How many times the states of all sequences, in size, the candidates keep of the judging ones."""
    return num_layers // JUDGING_STRIDE


FusePair = Callable[[int, Sequence[Tensor]], Mapping[str, Tensor]]
"""Weights of the layer that layers i and i + 1 become, from i and states (1, tokens T, hidden) before layer i."""


class PairCosts:
    """What each pair of adjacent layers would cost, as a divergence from the dense model's predictions.

    A pair's cost is what its fusion adds. It is measured once, on the model as it then is, and again when one of the
    two layers changes: pairs that share no layer hardly touch each other's.

    Parameters
    ----------
    decoder : Decoder
        The dense model.
    boundaries : Boundaries
        Its states on calibration text; kept up to date by others.
    fuse : FusePair
    store : StateStore

    Attributes
    ----------
    by_layer : list of float
        For each layer j, nats per token that joining it with layer j - 1 adds; inf where that is not allowed, as the
        first and the last layer stay.
    """

    def __init__(self, decoder: Decoder, boundaries: Boundaries, fuse: FusePair, store: StateStore) -> None:
        self._decoder, self._boundaries, self._fuse, self._store = decoder, boundaries, fuse, store
        count = len(boundaries.before(0))
        self._judging = range(JUDGING_STRIDE - 1, count, JUDGING_STRIDE) or range(count)
        self._fitting = [n for n in range(count) if n not in self._judging[1::2]]
        self._dense = self._judged(decoder.num_layers)
        self.by_layer = [math.inf] * decoder.num_layers
        self._measure(range(2, decoder.num_layers - 1), current=0.0)

    def update(self, i: int) -> None:
        """Layers i and i + 1 have become layer i, which the boundaries know."""
        del self.by_layer[i + 1]
        (current,) = self._divergences([self._judged(self._decoder.num_layers)])
        self._measure([j for j in (i, i + 1) if 2 <= j < len(self.by_layer) - 1], current=current)

    def _judged(self, index: int) -> list[Tensor]:
        states = self._boundaries.before(index)
        return [states[n] for n in self._judging]

    @torch.no_grad()
    def _measure(self, joined: Sequence[int], *, current: float) -> None:
        """Fuse each of these layers j with layer j - 1, run all results upwards together, and compare predictions."""
        if not joined:
            return
        states: dict[int, Sequence[Tensor]] = {}
        upwards = range(min(joined), self._decoder.num_layers)
        bar = progress(upwards, desc="Trying pairs", unit="layer", leave=False)
        for index, layer in zip(bar, self._decoder.layers(upwards), strict=True):
            for j, before in states.items():
                states[j] = self._store.keep(self._decoder.run_layer(layer, state) for state in before)
            if index in joined:
                states[index] = self._after_fused(index - 1)
        for j, cost in zip(states, self._divergences(states.values()), strict=True):
            self.by_layer[j] = cost - current

    def _after_fused(self, i: int) -> Sequence[Tensor]:
        """The judging states after the layer that layers i and i + 1 would become."""
        before = self._boundaries.before(i)
        layer = build_layer(self._decoder, self._fuse(i, [before[n] for n in self._fitting]))
        states = on_device(self._judged(i), layer, self._store)
        return self._store.keep(self._decoder.run_layer(layer, state) for state in states)

    @torch.no_grad()
    def _divergences(self, candidates: Iterable[Sequence[Tensor]]) -> list[float]:
        """Mean divergence per token from the dense model's predictions, of final states of the judging sequences."""
        candidates = list(candidates)
        totals = [0.0] * len(candidates)
        with self._decoder.head() as head:
            for n, dense in enumerate(self._dense):
                states = [candidate[n].to(dense.device).split(_ROWS, dim=1) for candidate in candidates]
                for rows, *fused_rows in zip(dense.split(_ROWS, dim=1), *states, strict=True):
                    expected = head(rows)[0].float().log_softmax(-1)
                    for k, fused in enumerate(fused_rows):
                        totals[k] += divergence(expected, head(fused)[0])
        tokens = sum(state.shape[1] for state in self._dense)
        # What cannot be computed with, as where float16 overflows, is no candidate.
        return [total / tokens if math.isfinite(total) else math.inf for total in totals]
