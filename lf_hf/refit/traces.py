"""Calibration text on its way through the layers of a group, and what a fit needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.half_fit import Problem, add_to_maps, empty_problem
from lf_hf.refit.layer_parts import after_half, mid_state
from lf_hf.refit.regression import Solver
from lf_hf.refit.states import States, new_list

Pass = Sequence[Tensor]
"""A batch's states in front of a group of layers and after each half of each layer, in order: (sequences B, tokens T,
hidden) each."""


class Traces(NamedTuple):
    """What a fit needs of text that passed a group."""

    attention_maps: list[Problem]  # one, of maps to what attention reads; without a first layer that reads the same
    attended: States  # the stream in front of the group, plus all that its attention adds to it
    mid_states: list[States]  # for each layer the stream between its halves
    output: States  # the stream after the group
    solver: Solver  # of the problems of the fit
    scale: Tensor | float  # what the group multiplies the stream by, beside all that it adds


def run_group(decoder: Decoder, layers: Sequence[DecoderLayer], states: States) -> Iterator[Pass]:
    """Run the layers of a group one after the other, with all states on the first layer's device."""
    for state in states:
        stream = [state.to(decoder.family.writer_weight(layers[0]).device)]
        for layer in layers:
            stream.append(mid_state(decoder, layer, stream[-1]))
            stream.append(after_half(decoder, decoder.family.mlp, layer, stream[-1]))
        yield stream


@torch.no_grad()
def trace(
    decoder: Decoder,
    layers: Sequence[DecoderLayer],
    passes: Iterable[Pass],
    states: States | None,
    *,
    rough_tokens: int | None = None,
) -> Traces:
    """Collect what a fit needs from each batch's pass through a group.

    `states` are the same text in front of the layer that is made; None where that is what the group's first one reads.
    `rough_tokens` are those of all batches together, for a rough fit.
    """
    like = decoder.family.writer_weight(layers[0])
    solver = Solver(rough_tokens)
    half = decoder.family.layer_mixer(layers[0])
    equal, hidden = int(states is None), decoder.config.hidden_size
    maps = empty_problem(decoder, ((len(layers) - equal) * hidden, hidden), like, solver)
    attended, output = new_list(decoder), new_list(decoder)
    mid_states = [new_list(decoder) for _ in layers]
    scales: list[Tensor | float] = [1.0]  # in front of each layer, and behind the last one
    for layer in layers:
        scales.append(scales[-1] * decoder.family.scale(layer, like.device))
    for number, of_batch in enumerate(passes):
        stream = [state.to(like.device) for state in of_batch]
        before, between = stream[:-1:2], stream[1::2]
        state = stream[0] if states is None else states[number].to(like.device)
        add_to_maps(maps, decoder, half, state, before[equal:])
        added = (mid - start for start, mid in zip(before, between, strict=True))
        if decoder.family.scalar:
            added = (part / scale for part, scale in zip(added, scales[:-1], strict=True))
        attended.append(stream[0] + sum(added))
        for kept, mid in zip(mid_states, between, strict=True):
            kept.append(mid)
        output.append(stream[-1])
    return Traces([maps], attended, [*mid_states], output, solver, scales[-1])
