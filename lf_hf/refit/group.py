"""One layer for a group of layers: what `fit` needs is brought together, and what it gives is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.families import DecoderLayer, Kind
from lf_hf.refit.fit import FitOverflow, HalfFit, fit_attention, fit_mlp
from lf_hf.refit.layer_parts import build_layer, layer_weights, mid_state
from lf_hf.refit.normed_half import NormedHalfFit
from lf_hf.refit.states import StateStore, Traces, on_device
from lf_hf.runtime.numerics import all_finite


@dataclass(frozen=True)
class GroupFit:
    """One layer for a group of layers, and how it came about.

    Errors are what is left of what a half should write, squared and relative; where that goes through a norm, in front
    of it.
    """

    weights: dict[str, Tensor]
    kind: Kind
    heads_kept: list[int] | None  # key-value groups from each layer of the group, where they were selected
    channels_kept: list[int] | None  # likewise of the MLP
    error_before: float  # of the MLP, with down_proj as it was
    error_after: float
    attention_error: float | None  # where o_proj was fitted


@torch.no_grad()
def fit_group(
    decoder: Decoder,
    layers: list[DecoderLayer],
    traces: Traces,
    states: Sequence[Tensor],
    store: StateStore,
    *,
    refit: str,
    ridge: float,
    quick: bool = False,
) -> GroupFit:
    """One layer that does to `states` what a group of layers did to theirs.

    Parameters
    ----------
    decoder : Decoder
    layers : list of DecoderLayer
        The group; a single layer is only fitted. The list is emptied: layers that nobody else holds make room.
    traces : Traces
        Calibration text on its way through the group.
    states : sequence of tensors of shape (sequences B, tokens T, hidden)
        The same text before the layer that is made: the traces' first inputs unless layers below were fused.
    store : StateStore
    refit : {"none", "down_proj", "projections"}
    ridge : float
    quick : bool
        Keep the largest channels, and choose key-value groups in one round: many times faster, and good enough to
        compare groups.

    Raises
    ------
    FitOverflow
        If a weight that was fitted, or what it is fitted to, is beyond its dtype.
    """
    family = decoder.family
    states = on_device(states, layers[0], store)  # the layers of a model on several devices come together on the first
    device = layers[0].mlp.down_proj.weight.device
    kinds = [family.layer_kind(layer) for layer in layers]
    group = [
        {name: weight.to(device) for name, weight in layer_weights(decoder, layers.pop(0)).items()}
        for _ in range(len(layers))
    ]

    weights, kind, heads_kept, attention_error = group[0], kinds[0], None, None
    half_fit = NormedHalfFit if family.mlp.after else HalfFit  # families have such norms in both halves, or in none
    if refit == "projections":
        targets = traces.attention_targets
        attention = half_fit(decoder, family.attention, states, traces.inputs, targets, ridge, quick)
        weights, kind, heads_kept, attention_error = fit_attention(attention, group, kinds)
    fused = build_layer(decoder, weights, kind)
    mid_states = store.keep(mid_state(decoder, fused, state) for state in states)
    del fused
    norms = [f"{norm}.weight" for norm in family.attention.norms]
    weights = {name: weight for name, weight in weights.items() if name.startswith("self_attn.") or name in norms}
    mlp = half_fit(decoder, family.mlp, mid_states, traces.mid_states, lambda: traces.output, ridge, quick)
    of_mlp, channels_kept, errors = fit_mlp(mlp, group, refit)
    weights |= of_mlp
    for name, weight in weights.items():
        weights[name] = weight = weight.contiguous()
        decoder.processes.broadcast(weight)  # in case machines round differently
        if not all_finite(weight):
            raise FitOverflow(f"The {name} that was fitted overflows {weight.dtype}; use a dtype of wider range.")
    return GroupFit(weights, kind, heads_kept, channels_kept, *errors, attention_error)
