"""Calibration text on its way through the layers of a group, and what a fit needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.half_fit import Problem, add_to_map, empty_problem
from lf_hf.refit.layer_parts import after_half, mid_state
from lf_hf.refit.regression import Failures
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
    failures: Failures  # of the problems of the fit


@torch.no_grad()
def trace(decoder: Decoder, layers: Sequence[DecoderLayer], dense: States, states: States | None) -> Traces:
    """Run a group's layers one after the other, with all states on the first layer's device.

    `dense` is what the first layer reads, and `states` the same text in front of the layer that is made; None where
    that is the same.
    """
    return gather(decoder, layers, (_passed(decoder, layers, state) for state in dense), states)


def _passed(decoder: Decoder, layers: Sequence[DecoderLayer], state: Tensor) -> Pass:
    stream, mid_states = [state.to(layers[0].mlp.down_proj.weight.device)], []
    for layer in layers:
        mid_states.append(mid_state(decoder, layer, stream[-1]))
        stream.append(after_half(decoder, decoder.family.mlp, layer, mid_states[-1]))
    return stream, mid_states


@torch.no_grad()
def gather(
    decoder: Decoder,
    layers: Sequence[DecoderLayer],
    passes: Iterable[Pass],
    states: States | None,
    *,
    rough_tokens: int | None = None,
) -> Traces:
    """Collect what a fit needs from each batch's pass through a group. Other arguments are those of `trace`.

    `rough_tokens` are those of all batches together, for a rough fit.
    """
    like = layers[0].mlp.down_proj.weight
    failures = Failures()
    halves = [decoder.family.layer_mixer(layer) for layer in layers]
    shape = decoder.config.hidden_size, decoder.config.hidden_size
    maps: list[Problem | None] = [] if states is not None else [None]
    maps += [empty_problem(decoder, shape, like, failures, rough_tokens) for _ in layers[len(maps) :]]
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
    return Traces(maps, attended, [*mid_states], output, failures)
