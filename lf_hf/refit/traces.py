"""States of calibration text on their way through a group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer
from lf_hf.refit.layer_parts import after_attention, after_mlp
from lf_hf.refit.states import StateStore


@dataclass(frozen=True)
class Traces:
    """States of sequences on their way through a group's layers; each is (sequences B, tokens T, hidden).

    `inputs` and `residuals` have one list a layer: before it, and between its attention and its MLP.
    """

    inputs: list[Sequence[Tensor]]
    residuals: list[Sequence[Tensor]]
    output: Sequence[Tensor]


@torch.no_grad()
def trace(decoder: Decoder, layers: Sequence[DecoderLayer], states: Sequence[Tensor], store: StateStore) -> Traces:
    """Run layers one after the other; all states are kept where the first one's weights are."""
    inputs, residuals = [on_device(states, layers[0], store)], []
    for layer in layers:
        residuals.append(store.keep(after_attention(decoder, layer, state) for state in inputs[-1]))
        inputs.append(store.keep(after_mlp(decoder, layer, residual) for residual in residuals[-1]))
    return Traces(inputs[:-1], list(residuals), inputs[-1])


def on_device(states: Sequence[Tensor], layer: DecoderLayer, store: StateStore) -> Sequence[Tensor]:
    """The same states where a layer's weights are."""
    device = layer.mlp.down_proj.weight.device
    return states if not states or states[0].device == device else store.keep(state.to(device) for state in states)
