"""Hidden states of calibration text: on their way through a group of layers, and at every layer boundary of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder, check_finite
from lf_hf.families import DecoderLayer
from lf_hf.refit.layer_parts import after_half, mid_state
from lf_hf.refit.states import StateStore
from lf_hf.stages.activations import influence


@dataclass(frozen=True)
class Traces:
    """States of sequences on their way through a group's layers; each is (sequences B, tokens T, hidden)."""

    inputs: list[Sequence[Tensor]]  # before each layer
    mid_states: list[Sequence[Tensor]]  # between its attention and its MLP
    output: Sequence[Tensor]

    def attention_targets(self) -> Iterator[Tensor]:
        """The states before the first layer, with all that the attention of any layer of the group added to them."""
        for n, first in enumerate(self.inputs[0]):
            yield first + sum(r[n] - i[n] for r, i in zip(self.mid_states, self.inputs, strict=True))


@torch.no_grad()
def trace(decoder: Decoder, layers: Sequence[DecoderLayer], states: Sequence[Tensor], store: StateStore) -> Traces:
    """Run layers one after the other; all states are kept where the first one's weights are."""
    inputs, mid_states = [on_device(states, layers[0], store)], []
    for layer in layers:
        mid_states.append(store.keep(mid_state(decoder, layer, state) for state in inputs[-1]))
        inputs.append(store.keep(after_half(decoder, decoder.family.mlp, layer, state) for state in mid_states[-1]))
    return Traces(inputs[:-1], mid_states, inputs[-1])


def on_device(states: Sequence[Tensor], layer: DecoderLayer, store: StateStore) -> Sequence[Tensor]:
    """The same states where a layer's weights are."""
    device = layer.mlp.down_proj.weight.device
    return states if not states or states[0].device == device else store.keep(state.to(device) for state in states)


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
