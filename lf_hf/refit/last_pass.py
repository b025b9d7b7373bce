"""The last pass: every fused layer is fitted, from the bottom up, to what the dense model computes there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.decoder.predictions import divergences
from lf_hf.families import DecoderLayer
from lf_hf.refit.fit import token_weights
from lf_hf.refit.group import GroupFit, fit_group
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import StateStore, trace
from lf_hf.refit.tuning import Steps, channel_weights, steps_of, tune
from lf_hf.report.records import FittedLayer
from lf_hf.runtime.numerics import in_float64
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig


@torch.no_grad()
def fit_from_bottom(
    decoder: Decoder,
    dense: Decoder,
    groups: Sequence[list[int]],
    sequences: Sequence[Tensor],
    config: FusionConfig,
    held_out: Sequence[Tensor] = (),
    *,
    tuned: bool = True,
) -> tuple[list[FittedLayer], float]:
    """Fit every fused layer, from the bottom up, to what the dense model computes at its place.

    With merge="select" each fused layer is made again from all layers of its group; with refit="projections" it is then
    trained by itself, unless that makes it worse on held-out text. Where a layer of the group, as it is, comes nearer
    to what they do to held-out text, it is taken instead.

    Parameters
    ----------
    decoder, dense : Decoder
        The fused model, whose fused layers are changed, and the dense model.
    groups : sequence of lists of int
        For each layer, the layers of the dense model that it stands for.
    sequences : sequence of int64 tensors of shape (tokens T,)
        Calibration text.
    held_out : sequence of int64 tensors of shape (tokens T,)
        Text that nothing is fitted to.
    tuned : bool
        Whether layers are trained after their fits at all.

    Returns
    -------
    list of FittedLayer
    float
        Divergence of predictions from the dense model's on the held-out text, in nats a token; 0 without one.
    """
    widest = max(map(len, groups))
    embedded, embedded_held = (
        decoder.embed(decoder.batches(decoder.processes.shard(text))) for text in (sequences, held_out)
    )
    held = _HeldOut(decoder, embedded_held)
    steps = steps_of(decoder, sequences) if tuned and config.refit == "projections" and held_out else None
    # At a time: the group's traces, and the states before and after it of the dense and of the fused model.
    with StateStore.with_room(decoder, sum(state.nbytes for state in embedded) * (2 * widest + 5)) as store:
        dense_states: Sequence[Tensor] = store.keep(embedded)
        states = dense_states
        del embedded, embedded_held
        fitted = []
        dense_layers = dense.layers(range(dense.num_layers))
        for index, group in enumerate(progress(groups, desc="Last pass", unit="layer")):
            if len(group) == 1:
                layer, is_dense = next(dense_layers), states is dense_states
                dense_states = _after(decoder, layer, dense_states, store)
                states = dense_states if is_dense else _after(decoder, layer, states, store)
                held.cross_dense([layer])
                held.cross(layer)
                del layer
                continue
            layers = [next(dense_layers) for _ in group]
            traces = trace(decoder, layers, dense_states, store)
            held.cross_dense(layers)
            of_layers = [held.missed(layer)[0] for layer in layers] if config.merge == "select" else []
            if config.merge != "select":
                layers = [decoder.layer(index)]
            fit = fit_group(decoder, layers, traces, states, store, refit=config.refit, ridge=config.ridge)
            dense_states = traces.output
            del layers, traces
            fused, missed, missed_first = _tuned(decoder, fit, states, dense_states, steps, held)
            # What a layer misses that overflows is NaN.
            least = min(filter(math.isfinite, of_layers), default=math.inf)
            instead = group[of_layers.index(least)] if math.isfinite(least) and not missed <= least else None
            layer = fused if instead is None else dense.layer(instead)
            decoder.replace(index, layer_weights(decoder, layer), decoder.family.layer_kind(layer))
            del fused
            layer = decoder.layer(index)
            states = _after(decoder, layer, states, store)
            held.cross(layer)
            del layer
            on_held_out = (missed, missed_first) if held_out else (None, None)
            fitted.append(_reported(group, fit, on_held_out, instead))
    return fitted, held.divergence() if held_out else 0.0


def _after(decoder: Decoder, layer: DecoderLayer, states: Sequence[Tensor], store: StateStore) -> Sequence[Tensor]:
    return store.keep(decoder.run_layer(layer, state) for state in states)


def _reported(
    group: list[int], fit: GroupFit, on_held_out: tuple[float | None, float | None], instead: int | None
) -> FittedLayer:
    """What is said of a fused layer, or of the layer of its group that is taken instead, with all that it has."""
    heads_kept, channels_kept = fit.heads_kept, fit.channels_kept
    if instead is not None:
        heads_kept, channels_kept = (
            kept and [sum(kept) if number == instead else 0 for number in group] for kept in (heads_kept, channels_kept)
        )
    errors = fit.error_before, fit.error_after, fit.attention_error
    return FittedLayer(group, heads_kept, channels_kept, *errors, *on_held_out, instead)


def _tuned(
    decoder: Decoder,
    fit: GroupFit,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: Steps | None,
    held: _HeldOut,
) -> tuple[DecoderLayer, float, float]:
    """A layer as fitted, or trained after that where it then misses less of held-out text; and what it misses."""
    layer = build_layer(decoder, fit.weights, fit.kind)
    missed = held.missed(layer)
    if steps:
        tuned = build_layer(decoder, fit.weights, fit.kind)
        tuned.load_state_dict(tune(decoder, tuned, states, targets, steps))
        if (of_tuned := held.missed(tuned)) < missed:
            layer, missed = tuned, of_tuned
    return layer, *missed


class _HeldOut:
    """Held-out text on its way through the dense and through the fused model, one layer or group after the other."""

    def __init__(self, decoder: Decoder, embedded: Sequence[Tensor]) -> None:
        self._decoder, self._states = decoder, list(embedded)  # in front of the fused model's layer
        self._dense = self._target = self._states  # in front of the dense model's layers, and after them

    def cross_dense(self, layers: Sequence[DecoderLayer]) -> None:
        """Run layers of the dense model."""
        self._dense = self._target
        for layer in layers:
            self._target = [self._decoder.run_layer(layer, state) for state in self._target]

    def missed(self, layer: DecoderLayer) -> tuple[float, float]:
        """The part of what the dense model's layers did to the stream that a layer in their place misses.

        Squared and weighted as in fits: of all tokens, as a mean over the stream's channels, and of each first one.
        """
        device, hidden = layer.mlp.down_proj.weight.device, self._decoder.config.hidden_size
        sums = torch.zeros(2, 2, hidden, dtype=torch.float64)  # missed and done, of all tokens and of the first ones
        for state, dense, target in zip(self._states, self._dense, self._target, strict=True):
            output = self._decoder.run_layer(layer, state.to(device))
            token_weight = token_weights(self._decoder, target)
            for n, part in enumerate((output, dense)):
                squares = (part.to(target.device).float() - target.float()).square()  # (sequences B, tokens T, hidden)
                squares *= token_weight.view(*target.shape[:2], 1)
                sums[n] += torch.stack([in_float64(some).sum((0, 1)).cpu() for some in (squares, squares[:, :1])])
        self._decoder.processes.all_reduce(sums)
        (of_all, of_first), (done, done_first) = sums
        missed_first = of_first.sum() / done_first.sum() if done_first.any() else of_first.sum()
        return float((channel_weights(done) * of_all).sum()), float(missed_first)

    def cross(self, layer: DecoderLayer) -> None:
        """Run the fused model's layer in their place."""
        self._states = [self._decoder.run_layer(layer, state) for state in self._states]

    def divergence(self) -> float:
        """Of the fused model's predictions from the dense model's, after the last layer, in nats a token."""
        return divergences(self._decoder, self._target, [self._states])[0]
