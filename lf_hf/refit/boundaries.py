"""Hidden states of calibration text at every layer boundary of a model that is being fused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder, check_finite
from lf_hf.refit.states import StateStore
from lf_hf.stages.activations import influence


class Boundaries:
    """States before each layer and after the last, kept up to date while layers are fused.

    Updating after a fusion runs the layers from the fused one upwards, once.

    Parameters
    ----------
    decoder : Decoder
    embedded : sequence of tensors of shape (sequences B, tokens T, hidden)
        What the first layer reads: this process's share of the text.
    store : StateStore

    Attributes
    ----------
    influences : list of float
        For each layer, how much it changes the residual stream.
    """

    def __init__(self, decoder: Decoder, embedded: Sequence[Tensor], store: StateStore) -> None:
        self.influences: list[float] = []
        self._decoder, self._store = decoder, store
        self._states: list[Sequence[Tensor]] = [store.keep(embedded)]
        self.update(0)

    def before(self, index: int) -> Sequence[Tensor]:
        """The input states of layer `index`, or, for the number of layers, the last layer's output."""
        return self._states[index]

    @torch.no_grad()
    def update(self, index: int) -> None:
        """Layers from `index` on have changed.

        Raises
        ------
        ValueError
            If a layer's output contains NaN or inf; the layer is named.
        """
        del self.influences[index:], self._states[index + 1 :]
        upwards = range(index, self._decoder.num_layers)
        for position, layer in zip(upwards, self._decoder.layers(upwards), strict=True):
            states = self._states[position]
            after = self._store.keep(self._decoder.run_layer(layer, state) for state in states)
            self.influences.append(influence(states, after, self._decoder.processes))
            if math.isnan(self.influences[-1]):
                check_finite(after, position)
            self._states.append(after)
