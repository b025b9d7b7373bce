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
from lf_hf.decoder.demand import Need, Setup, times
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.experts import num_competing
from lf_hf.refit.fit import fit_group, fitting
from lf_hf.refit.half_fit import token_weights
from lf_hf.refit.layer_parts import build_layer
from lf_hf.refit.states import States, keep, run_states
from lf_hf.refit.traces import run_group, trace
from lf_hf.refit.tuning import Steps, channel_weights, training_steps, tune, tuning
from lf_hf.report.data import FusedLayer, MadeLayer
from lf_hf.runtime.numerics import in_float64, to_device, to_host
from lf_hf.runtime.progress import progress
from lf_hf.settings import FusionConfig


@torch.no_grad()
def fit_groups(
    dense: Decoder, groups: Sequence[Group], sequences: Sequence[Tensor], held_out: Sequence[Tensor], *, ridge: float
) -> Iterator[MadeLayer]:
    """Fit one layer for each group, from the bottom up, to what the dense model computes at its place.

    After its fit a layer is trained by itself, unless that makes it worse on held-out text. Where a layer of the group,
    as it is, comes nearer to what the group does to held-out text, it is taken instead.

    Groups are in ascending order, and the dense model is not changed. Sequences of calibration text, and of held-out
    text, of which there may be none, have the shape (tokens T,).
    """
    judge = _HeldOutText(dense, held_out)
    steps = training_steps(dense, sequences) if held_out else None
    dense_states = keep(dense, dense.embed(dense.make_batches(sequences)))
    states: States | None = None  # of the fused model; None as long as no layer below is fused
    up_to = groups[-1][1] + 1  # nothing is fitted above the last group
    dense_layers = dense.layers(range(up_to))
    grouped = {number for first, last in groups for number in range(first, last + 1)}
    alone = [(number, number) for number in range(up_to) if number not in grouped]
    for first, last in progress(sorted([*groups, *alone]), desc="Fitting layers", unit="layer"):
        layers = [next(dense_layers) for _ in range(first, last + 1)]
        judge.run_dense(layers)
        if first == last:
            [layer] = layers
            dense_states = run_states(dense, layer, dense_states)
            if states is not None:
                states = run_states(dense, layer, states)
            judge.run(layer)
            continue
        missed_by_layer = [judge.missed(layer) for layer in layers]
        traces = trace(dense, layers, run_group(dense, layers, dense_states), states)
        before = dense_states if states is None else states
        dense_states = traces.output
        fit = fit_group(dense, layers, traces, before, ridge=ridge, first=first)
        del layers, traces
        if steps is not None:
            fit = _best(dense, fit, before, dense_states, steps, judge, missed_by_layer)
        layer = build_layer(dense, fit.weights, fit.kind)
        states = run_states(dense, layer, before)
        judge.run(layer)
        del layer, before
        yield fit


def _best(
    dense: Decoder,
    fit: MadeLayer,
    states: States,
    targets: States,
    steps: Steps,
    judge: _HeldOutText,
    missed_by_layer: Sequence[Tensor],
) -> MadeLayer:
    """What misses least of held-out text: the layer as fitted, or trained after that, or one of its group as it is."""
    layers = [build_layer(dense, fit.weights, fit.kind) for _ in range(2)]
    fitted, trained = layers
    # Assigned, as some are the dense model's; a scalar of the layer is not trained.
    trained.load_state_dict(tune(dense, trained, states, targets, steps), strict=False, assign=True)
    missed = torch.stack(to_host(judge.missed(fitted), judge.missed(trained), *missed_by_layer)).tolist()
    errors = [error if math.isfinite(error) else math.inf for error, _ in missed]  # what overflows is NaN
    best = errors.index(min(errors))
    held_out_error, first_token_error = missed[best]
    entry = replace(fit.entry, held_out_error=held_out_error, first_token_error=first_token_error)
    if best < len(layers):
        return fit._replace(weights=dense.family.unpacked(layers[best]), entry=entry)
    number = entry.layers[best - len(layers)]
    layer = dense.layer(number)
    is_taken = [other == number for other in entry.layers]
    assert entry.heads_kept and entry.channels_kept
    entry = FusedLayer(
        entry.layers,
        shares=[float(taken) for taken in is_taken],
        heads_kept=[sum(entry.heads_kept) * taken for taken in is_taken],
        channels_kept=[sum(entry.channels_kept) * taken for taken in is_taken],
        held_out_error=held_out_error,
        first_token_error=first_token_error,
        layer_instead=number,
    )
    return MadeLayer(dense.family.unpacked(layer), dense.family.layer_kind(layer), entry)


class _HeldOutText:
    """Held-out text on its way through the dense and through the fused model, one layer or group after the other."""

    def __init__(self, decoder: Decoder, sequences: Sequence[Tensor]) -> None:
        self._decoder = decoder
        batches = decoder.make_batches(sequences)
        self._states = decoder.embed(batches)  # in front of the fused model's layer
        self._target = self._states  # after the dense model's layers

    def run_dense(self, layers: Sequence[DecoderLayer]) -> None:
        """Run layers of the dense model."""
        before = self._target
        for layer in layers:
            self._target = self._run(layer, self._target)
        self._done = self._missed(before)

    def run(self, layer: DecoderLayer) -> None:
        """Run the layer of the fused model that stands in their place."""
        self._states = self._run(layer, self._states)

    def _run(self, layer: DecoderLayer, states: list[Tensor]) -> list[Tensor]:
        device = self._decoder.family.writer_weight(layer).device
        return [self._decoder.run_layer(layer, state.to(device)) for state in states]

    def missed(self, layer: DecoderLayer) -> Tensor:
        """Relative error of a layer in place of the dense model's layers, in what they do to the stream: float64, (2,).

        Squared and weighted as in fits: of all tokens, as a mean over the stream's channels, and of each first one.
        """
        missed = self._missed(self._run(layer, self._states))
        error = (channel_weights(self._done[0]) * missed[0]).sum()
        done_first = torch.where(self._done[1].any(), self._done[1].sum(), 1.0)
        return torch.stack([error, missed[1].sum() / done_first])

    def _missed(self, states: Sequence[Tensor]) -> Tensor:
        """Weighted squared differences from the target by channel, of all tokens and of the first ones: float64,
        (2, hidden)."""
        missed = torch.zeros(2, self._decoder.config.hidden_size, dtype=torch.float64)
        for state, target in zip(states, self._target, strict=True):
            squares = (state.to(target.device).float() - target.float()).square()  # (sequences B, tokens T, hidden)
            squares *= token_weights(self._decoder, target).view(*target.shape[:2], 1)
            sums = torch.stack([in_float64(part).sum((0, 1)) for part in (squares, squares[:, :1])])
            missed = to_device(missed, sums.device) + sums
        return missed


def making(setup: Setup, config: FusionConfig, groups: int) -> Need:
    """What `fit_groups` takes, where about so many groups leave `config.least_fusions` layers fewer."""
    tokens, length = config.calibration_tokens, config.calibration_length
    fit, _ = fitting(setup, length, tokens, setup.longest, is_rough=False)
    _, of_fit = fitting(setup, length, tokens, 1 + math.ceil(config.least_fusions / groups), is_rough=False)
    trained, of_training = tuning(setup, tokens, length)
    inside = setup.running(length, tokens) + max(fit, trained)
    made = config.least_fusions * setup.shape.layer_bytes  # at most
    # A group is given up before the layer that is made of it trains; where experts compete, as copies of theirs come.
    group = (setup.longest + 1 - num_competing(setup.shape, setup.longest)) * setup.shape.layer_bytes
    # Lists: between the halves of each layer; before all of them, after all attention and after all of them; of the
    # model as it becomes.
    lists = setup.states((setup.longest + 4) * tokens)
    # One stream from the first to the last group, and the dense one up to that: as long as all layers together.
    work = setup.forward(tokens, setup.shape.layers) + times(of_fit + of_training, groups)
    return Need(inside, lists, work, here=made, away=max(0, fit + group - max(fit, trained)))
