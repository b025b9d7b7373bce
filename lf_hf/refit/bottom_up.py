"""The fits of all groups, from the bottom up: each fused layer is fitted to what the dense model computes at its place.

Two streams run through the layers side by side: the dense model's, and that of the model as it becomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder, Group
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.fit import fit_group
from lf_hf.refit.half_fit import token_weights
from lf_hf.refit.layer_parts import build_layer, layer_weights
from lf_hf.refit.states import States, StateStore, run_states
from lf_hf.refit.traces import trace
from lf_hf.refit.tuning import Steps, channel_weights, training_steps, tune
from lf_hf.report.data import FusedLayer, MadeLayer
from lf_hf.runtime.numerics import in_float64, to_device, to_host
from lf_hf.runtime.progress import progress


@torch.no_grad()
def fit_groups(
    dense: Decoder, groups: Sequence[Group], sequences: Sequence[Tensor], held_out: Sequence[Tensor], *, ridge: float
) -> Iterator[MadeLayer]:
    """Fit one layer for each group, from the bottom up, to what the dense model computes at its place.

    After its fit a layer is trained by itself, unless that makes it worse on held-out text. Where a layer of the group,
    as it is, comes nearer to what the group does to held-out text, it is taken instead.

    Parameters
    ----------
    dense : Decoder
        The dense model, which is not changed.
    groups : sequence of Group, in ascending order
    sequences, held_out : sequences of int64 tensors of shape (tokens T,)
        Calibration text, and text that nothing is fitted to; there may be none of the latter.
    ridge : float
    """
    share = dense.processes.shard(sequences)
    batch_numbers = dense.batch_indices(share)
    embedded = dense.embed([torch.stack([share[n] for n in numbers]) for numbers in batch_numbers])
    judge = _HeldOutText(dense, held_out)
    steps = training_steps(dense, sequences, batch_numbers) if held_out else None
    with StateStore(dense.states, dense.scratch) as store:
        dense_states: States = store.keep(embedded)
        states: States | None = None  # of the fused model; None as long as no layer below is fused
        del embedded
        dense_layers = dense.layers(range(groups[-1][1] + 1))  # nothing is fitted above the last group
        for first, last in progress(_cover(groups), desc="Fitting layers", unit="layer"):
            layers = [next(dense_layers) for _ in range(first, last + 1)]
            judge.run_dense(layers)
            if first == last:
                [layer] = layers
                dense_states = run_states(dense, layer, dense_states, store)
                if states is not None:
                    states = run_states(dense, layer, states, store)
                judge.run(layer)
                continue
            missed_by_layer = [judge.missed(layer) for layer in layers]
            traces = trace(dense, layers, dense_states, states, store)
            before = dense_states if states is None else states
            dense_states = traces.output
            fit = fit_group(dense, layers, traces, before, store, ridge=ridge, first=first)
            del layers, traces
            if steps is not None:
                fit = _trained(dense, fit, before, dense_states, steps, judge)
                fit = _or_layer_instead(dense, fit, missed_by_layer)
            layer = build_layer(dense, fit.weights, fit.kind)
            states = run_states(dense, layer, before, store)
            judge.run(layer)
            del layer, before
            yield fit


def _cover(groups: Sequence[Group]) -> list[Group]:
    """All layers up to the last group's, as groups: those between the groups are alone in theirs."""
    covered: list[Group] = []
    number = 0
    for first, last in groups:
        covered += [(single, single) for single in range(number, first)]
        covered.append((first, last))
        number = last + 1
    return covered


def _trained(
    dense: Decoder, fit: MadeLayer, states: States, targets: States, steps: Steps, judge: _HeldOutText
) -> MadeLayer:
    """A layer as fitted, or trained after that where it then misses less of held-out text."""
    layer = build_layer(dense, fit.weights, fit.kind)
    missed = judge.missed(layer)
    trained = build_layer(dense, fit.weights, fit.kind)
    trained.load_state_dict(tune(dense, trained, states, targets, steps), assign=True)  # some are the dense model's
    missed_by_trained = judge.missed(trained)
    errors, errors_of_trained = torch.stack(to_host(missed, missed_by_trained)).tolist()
    if errors_of_trained < errors:
        layer, errors = trained, errors_of_trained
    held_out_error, first_token_error = errors
    entry = replace(fit.entry, held_out_error=held_out_error, first_token_error=first_token_error)
    return fit._replace(weights=layer_weights(dense, layer), entry=entry)


def _or_layer_instead(dense: Decoder, fit: MadeLayer, missed_by_layer: Sequence[Tensor]) -> MadeLayer:
    """The fitted layer, or that layer of its group which, as it is, misses less of held-out text."""
    fitted = fit.entry
    errors, first_token_errors = torch.stack(to_host(*missed_by_layer), dim=1).tolist()
    finite = [missed for missed in errors if math.isfinite(missed)]  # what overflows is NaN
    assert fitted.held_out_error is not None and fitted.heads_kept and fitted.channels_kept
    if not finite or fitted.held_out_error <= min(finite):
        return fit
    least = min(finite)
    place = errors.index(least)
    number = fitted.layers[place]
    layer = dense.layer(number)
    is_taken = [other == number for other in fitted.layers]
    entry = FusedLayer(
        fitted.layers,
        shares=[float(taken) for taken in is_taken],
        heads_kept=[sum(fitted.heads_kept) * taken for taken in is_taken],
        channels_kept=[sum(fitted.channels_kept) * taken for taken in is_taken],
        held_out_error=least,
        first_token_error=first_token_errors[place],
        layer_instead=number,
    )
    return MadeLayer(layer_weights(dense, layer), dense.family.layer_kind(layer), entry)


class _HeldOutText:
    """Held-out text on its way through the dense and through the fused model, one layer or group after the other."""

    def __init__(self, decoder: Decoder, sequences: Sequence[Tensor]) -> None:
        self._decoder = decoder
        batches = decoder.make_batches(decoder.processes.shard(sequences))
        self._states = decoder.embed(batches)  # in front of the fused model's layer
        self._dense = self._target = self._states  # in front of the dense model's layers, and after them

    def run_dense(self, layers: Sequence[DecoderLayer]) -> None:
        """Run layers of the dense model."""
        self._dense = self._target
        for layer in layers:
            self._target = self._run(layer, self._target)

    def run(self, layer: DecoderLayer) -> None:
        """Run the layer of the fused model that stands in their place."""
        self._states = self._run(layer, self._states)

    def _run(self, layer: DecoderLayer, states: list[Tensor]) -> list[Tensor]:
        device = layer.mlp.down_proj.weight.device
        return [self._decoder.run_layer(layer, state.to(device)) for state in states]

    def missed(self, layer: DecoderLayer) -> Tensor:
        """Relative error of a layer in place of the dense model's layers, in what they do to the stream: float64, (2,).

        Squared and weighted as in fits: of all tokens, as a mean over the stream's channels, and of each first one.
        """
        hidden = self._decoder.config.hidden_size
        missed = torch.zeros(2, hidden, dtype=torch.float64)  # of all tokens and of the first ones, by channel
        done = torch.zeros_like(missed)
        outputs = self._run(layer, self._states)
        for output, dense, target in zip(outputs, self._dense, self._target, strict=True):
            token_weight = token_weights(self._decoder, target)
            missed_here = _squares(output, target, token_weight)
            done_here = _squares(dense, target, token_weight)
            missed = to_device(missed, missed_here.device) + missed_here
            done = to_device(done, done_here.device) + done_here
        self._decoder.processes.all_reduce(missed)
        self._decoder.processes.all_reduce(done)
        error = (channel_weights(done[0]) * missed[0]).sum()
        done_first = torch.where(done[1].any(), done[1].sum(), 1.0)
        first_token_error = missed[1].sum() / done_first
        return torch.stack([error, first_token_error])


def _squares(states: Tensor, target: Tensor, token_weight: Tensor) -> Tensor:
    """Weighted squared differences by channel, summed over all tokens and over the first ones: (2, hidden), float64."""
    squares = (states.to(target.device).float() - target.float()).square()  # (sequences B, tokens T, hidden)
    squares *= token_weight.view(*target.shape[:2], 1)
    sums = [in_float64(part).sum((0, 1)) for part in (squares, squares[:, :1])]
    return torch.stack(sums)
