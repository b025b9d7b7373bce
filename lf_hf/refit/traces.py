"""Calibration text on its way through the layers of a group, and what a fit needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.half_fit import Problem, add_to_map, empty_problem
from lf_hf.refit.layer_parts import after_half, mid_state
from lf_hf.refit.regression import Solver
from lf_hf.refit.states import States, new_list

Pass = tuple[Sequence[Tensor], Sequence[Tensor]]
"""A batch's states in front of each layer of a group and after the last one, and between the halves of each layer; all
of shape (sequences B, tokens T, hidden)."""


class Traces(NamedTuple):
    """What a fit needs of text that passed a group."""

    attention_maps: list[Problem | None]  # to what each layer's attention reads; None for the identity
    attended: States  # the stream in front of the group, plus all that its attention adds to it
    mid_states: list[States]  # for each layer the stream between its halves
    output: States  # the stream after the group
    solver: Solver  # of the problems of the fit


def run_group(decoder: Decoder, layers: Sequence[DecoderLayer], states: States) -> Iterator[Pass]:
    """Run the layers of a group one after the other, with all states on the first layer's device."""
    for state in states:
        stream, mid_states = [state.to(layers[0].mlp.down_proj.weight.device)], []
        for layer in layers:
            mid_states.append(mid_state(decoder, layer, stream[-1]))
            stream.append(after_half(decoder, decoder.family.mlp, layer, mid_states[-1]))
        yield stream, mid_states


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
    like = layers[0].mlp.down_proj.weight
    solver = Solver(rough_tokens)
    halves = [decoder.family.layer_mixer(layer) for layer in layers]
    shape = decoder.config.hidden_size, decoder.config.hidden_size
    maps: list[Problem | None] = [] if states is not None else [None]
    maps += [empty_problem(decoder, shape, like, solver) for _ in layers[len(maps) :]]
    attended, output = new_list(decoder), new_list(decoder)
    mid_states = [new_list(decoder) for _ in layers]
    for number, (stream, between) in enumerate(passes):
        start, *_, end = stream = [state.to(like.device) for state in stream]
        between = [state.to(like.device) for state in between]
        state = start if states is None else states[number].to(like.device)
        for problem, half, read in zip(maps, halves, stream, strict=False):
            if problem is not None:
                add_to_map(problem, decoder, half, state, read)
        attended.append(start + sum(mid - before for mid, before in zip(between, stream, strict=False)))
        for kept, mid in zip(mid_states, between, strict=True):
            kept.append(mid)
        output.append(end)
    return Traces(maps, attended, [*mid_states], output, solver)
