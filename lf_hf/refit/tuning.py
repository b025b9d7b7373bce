"""The end of a fit: a fused layer is trained by itself to do to the residual stream what its group did.

A fit solves for what a layer writes with, and leaves what reads the stream as it was in the group. Some passes of
gradient descent over the same states, through this one layer, move all of its weights. No other layer, and no loss over
the vocabulary, is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import get_cosine_schedule_with_warmup

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.demand import STEP_BYTES, TRAINED_BYTES, Setup, Work, activation_bytes
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.half_fit import token_weights
from lf_hf.runtime.amounts import STEP_TOKENS, num_passes
from lf_hf.runtime.numerics import in_float64, to_device, typical_size

Row = tuple[int, int]
"""A sequence: the number of its batch, and its row there."""

_WARM_UP_STEPS = 10
_RELATIVE_RATE = 2.75e-3  # of the size of the layer's weights


@torch.no_grad()
def tune(
    decoder: Decoder,
    layer: DecoderLayer,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    steps: Steps,
) -> dict[str, Tensor]:
    """The parameters of a layer after training it to turn `states` into `targets`, by the layer's own names.

    By AdamW on squared errors, weighted as in fits. `states` and `targets` (sequences B, tokens T, hidden) are the
    stream in front of the layer, and as it should be after it, of the text that `steps` are of.
    """
    like = decoder.family.writer_weight(layer)
    device, dtype = like.device, like.dtype
    computed = torch.bfloat16 if dtype == torch.float16 else dtype  # in which gradients do not underflow
    weights = {
        name: parameter.detach().to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        for name, parameter in layer.named_parameters()
    }
    changes = torch.zeros(decoder.config.hidden_size, dtype=torch.float64)
    for state, target in zip(states, targets, strict=True):
        squares = (target.float() - state.to(target.device).float()).square().flatten(0, 1)
        change = in_float64(token_weights(decoder, target) @ squares)
        changes = to_device(changes, change.device) + change
    scale = channel_weights(changes).to(device, torch.float32)
    rate = _RELATIVE_RATE * typical_size(weights.values())
    optimizer = torch.optim.AdamW(weights.values(), rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARM_UP_STEPS, len(steps.rows))
    for step in steps.rows:
        for rows in step.values():
            state, target = (_taken(batches, rows).to(device) for batches in (states, targets))
            state = state.to(computed)
            with torch.enable_grad():
                cast = {name: weight.to(computed) for name, weight in weights.items()}
                output = functional_call(layer, cast, (state,), decoder.layer_inputs(state, layer))
                missed = (output - target).to(scale.dtype).square().flatten(0, 1) @ scale
                # Gradients are scaled to those of a whole pass: AdamW sees their size only through its eps.
                loss = missed @ token_weights(decoder, target).to(missed) * steps.per_pass
                loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: weight.detach().to(dtype) for name, weight in weights.items()}


class Steps(NamedTuple):
    """The sequences of each step of the training, by their length, and about how many steps a pass over the text is."""

    rows: list[dict[int, list[Row]]]
    per_pass: float


def training_steps(decoder: Decoder, sequences: Sequence[Tensor]) -> Steps:
    """The steps of some passes over sequences, (tokens T,) each."""
    passes = num_passes(sum(map(len, sequences)))
    batches = decoder.batch_indices(sequences)
    places = {number: (batch, row) for batch, numbers in enumerate(batches) for row, number in enumerate(numbers)}
    steps: list[dict[int, list[Row]]] = [{}]
    tokens = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        for number in torch.randperm(len(sequences), generator=generator).tolist():
            if tokens >= STEP_TOKENS:
                steps.append({})
                tokens = 0
            length = len(sequences[number])
            tokens += length
            steps[-1].setdefault(length, []).append(places[number])
    return Steps(steps, len(steps) / passes)


def _taken(batches: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Rows of batches of states, (sequences B, tokens T, hidden). A batch that rests elsewhere is fetched once and not
    kept."""
    taken: dict[Row, Tensor] = {}
    for number in dict.fromkeys(number for number, _ in rows):
        batch = batches[number]
        taken |= {(of_batch, row): batch[row].clone() for of_batch, row in rows if of_batch == number}
    return torch.stack([taken[row] for row in rows])


def channel_weights(changes: Tensor) -> Tensor:
    """A weight for each channel of the stream, from the squares that it changes by, as (hidden,).

    So all channels count alike, however large they are: some are a hundred times as large as others. One that hardly
    changes counts as if it changed by a tenth of what is usual.
    """
    least = (changes.median() / 100).clamp(min=torch.finfo(torch.float32).tiny)
    return 1 / changes.clamp(min=least) / len(changes)


def tuning(setup: Setup, tokens: int, length: int) -> tuple[int, Work]:
    """Bytes and work of the training of one layer on tokens in sequences of `length`."""
    shape, passes = setup.shape, num_passes(tokens)
    inside = TRAINED_BYTES * shape.layer + max(STEP_TOKENS, length) * activation_bytes(shape)
    work = Work(layer=5 * shape.active * passes * tokens)  # some gradients of what it reads are not needed
    return inside, work + Work(bytes=passes * tokens // STEP_TOKENS * STEP_BYTES * shape.layer)
