"""How far the model's predictions would move with each pair of layers fused, kept up to date while layers are fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.decoder.influence import divergence
from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer
from lf_hf.numerics import in_float64
from lf_hf.progress import progress
from lf_hf.refit.boundaries import Boundaries
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


@dataclass(frozen=True)
class Roles:
    """Numbers of the sequences, or of their batches, that candidates are fitted to, that judge them, or both."""

    fitting: Sequence[int]
    both: Sequence[int]
    judging: Sequence[int]

    @classmethod
    def of(cls, count: int) -> Roles:
        """Of `count` sequences."""
        judging = list(range(JUDGING_STRIDE - 1, count, JUDGING_STRIDE) or range(count))
        return cls([n for n in range(count) if n not in judging], judging[::2], judging[1::2])


FusePair = Callable[[int, Sequence[Tensor]], DecoderLayer]
"""The layer that layers i and i + 1 become, from i and states (sequences B, tokens T, hidden) before layer i."""


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
    roles : Roles
        What the batches of these states are for.
    fuse : FusePair
    store : StateStore

    Attributes
    ----------
    by_layer : list of float
        For each layer j, nats per token that joining it with layer j - 1 adds; inf where that is not allowed, as the
        first and the last layer stay.
    """

    def __init__(
        self, decoder: Decoder, boundaries: Boundaries, roles: Roles, fuse: FusePair, store: StateStore
    ) -> None:
        self._decoder, self._boundaries, self._fuse, self._store = decoder, boundaries, fuse, store
        self._fitting, self._judging = [*roles.fitting, *roles.both], [*roles.both, *roles.judging]
        self._dense = self._judged(decoder.num_layers)
        self.by_layer = [math.inf] * decoder.num_layers
        self._measure(range(2, decoder.num_layers - 1), current=0.0)

    def update(self, i: int) -> None:
        """Layers i and i + 1 have become layer i, which the boundaries know."""
        del self.by_layer[i + 1]
        (current,) = divergences(self._decoder, self._dense, [self._judged(self._decoder.num_layers)])
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
        for j, cost in zip(states, divergences(self._decoder, self._dense, states.values()), strict=True):
            self.by_layer[j] = cost - current

    def _after_fused(self, i: int) -> Sequence[Tensor]:
        """The judging states after the layer that layers i and i + 1 would become."""
        before = self._boundaries.before(i)
        layer = self._fuse(i, [before[n] for n in self._fitting])
        states = on_device(self._judged(i), layer, self._store)
        return self._store.keep(self._decoder.run_layer(layer, state) for state in states)


@torch.no_grad()
def divergences(decoder: Decoder, dense: Sequence[Tensor], candidates: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean divergence per token from the dense model's predictions, of final states of the same sequences.

    Each process has a share of the sequences. What cannot be computed with, as where float16 overflows, is inf.

    Parameters
    ----------
    dense, and each of `candidates` : sequences of tensors of shape (sequences B, tokens T, hidden)
    """
    candidates = list(candidates)
    totals = torch.zeros(len(candidates) + 1, dtype=torch.float64)
    with decoder.head() as head:
        for n, states in enumerate(dense):
            others = [_rows(candidate[n].to(states.device)) for candidate in candidates]
            for rows, *fused_rows in zip(_rows(states), *others, strict=True):
                expected = head(rows).float().log_softmax(-1)
                found = [divergence(expected, head(fused)) for fused in fused_rows]
                found.append(torch.full_like(found[0], rows.shape[1]))
                sums = in_float64(torch.stack(found))
                totals = totals.to(sums.device) + sums
    *of_candidates, tokens = decoder.processes.summed(totals)
    return [total / tokens if math.isfinite(total) else math.inf for total in of_candidates]


def _rows(states: Tensor) -> tuple[Tensor, ...]:
    """States (sequences B, tokens T, hidden) as some tokens at a time, each of shape (1, tokens, hidden)."""
    return states.flatten(0, 1)[None].split(_ROWS, dim=1)
