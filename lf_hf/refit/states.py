"""Hidden states of calibration text: on their way through layers, and where lists of them rest.

They rest on their device, in the machine's memory or on disk, as the decoder says.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.hidden_states import are_finite, check_finite
from lf_hf.families.table import DecoderLayer
from lf_hf.runtime.numerics import to_host

T = TypeVar("T")
Fetch = Callable[[], Tensor]
States = Sequence[Tensor]
"""Batches of states on their way through the layers, each of shape (sequences B, tokens T, hidden)."""


def _into_memory(state: Tensor) -> Fetch:
    """Into the machine's memory, locked where a card copies from it, so that copies do not hold up the host."""
    device = state.device
    kept = torch.empty(state.shape, dtype=state.dtype, pin_memory=device.type not in ("cpu", "mps"))
    kept.copy_(state, non_blocking=True)
    return lambda: kept.to(device, non_blocking=True)


def _into_file(folder: Path | None) -> Callable[[Tensor], Fetch]:
    """Into a new file that has no name, and so goes with the list."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the list

    def fetch(start: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        file.seek(start)
        data = np.fromfile(file, np.uint8, shape.numel() * dtype.itemsize)
        return torch.from_numpy(data).view(dtype).view(shape).to(device)

    def write(state: Tensor) -> Fetch:
        start = file.seek(0, os.SEEK_END)
        file.write(state.contiguous().view(torch.uint8).cpu().numpy().data)
        file.flush()
        return partial(fetch, start, state.shape, state.dtype, state.device)

    return write


class _Fetched(Sequence[Tensor]):
    """States that are kept elsewhere, and come back to their device when they are asked for."""

    def __init__(self, keep: Callable[[Tensor], Fetch]) -> None:
        self._keep = keep
        self._fetches: list[Fetch] = []

    def append(self, state: Tensor) -> None:
        self._fetches.append(self._keep(state))

    def __len__(self) -> int:
        return len(self._fetches)

    def __getitem__(self, index: Any) -> Any:
        return self._fetches[index]()


def drained(items: list[T]) -> Iterator[T]:
    """The items of a list, in order, which gives them up one by one: what nobody else holds is freed in between.

    So a fit hands over layers and states, which are gigabytes, and holds each no longer than it needs it.
    """
    while items:
        yield items.pop(0)


StateList = list[Tensor] | _Fetched
"""A list of states that grows."""


def new_list(decoder: Decoder) -> StateList:
    """A list that is empty, to which states can be appended."""
    if decoder.resting_place == "device":
        return []
    return _Fetched(_into_memory if decoder.resting_place == "host" else _into_file(decoder.scratch))


def keep(decoder: Decoder, states: Iterable[Tensor]) -> States:
    """A list of these states; only one of them need be on its device at a time."""
    kept = new_list(decoder)
    for state in states:
        kept.append(state)
    return kept


def run_states(decoder: Decoder, layer: DecoderLayer, states: States) -> States:
    """Run one layer, where its weights are."""
    device = decoder.family.writer_weight(layer).device
    return keep(decoder, (decoder.run_layer(layer, state.to(device)) for state in states))


@torch.no_grad()
def run_boundaries(decoder: Decoder, embedded: States) -> Iterator[States]:
    """States before each layer of the model, and after the last one.

    Raises ValueError at the end if a layer's output contains NaN or inf; the layer is named.
    """
    states = keep(decoder, embedded)
    yield states
    finite = []
    for layer in decoder.layers(range(decoder.num_layers)):
        states = run_states(decoder, layer, states)
        finite.append(are_finite(states))
        yield states
    check_finite([bool(holds) for holds in to_host(*finite)])
