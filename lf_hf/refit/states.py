"""Hidden states of calibration text: on their way through layers, and where lists of them rest.

They rest on their device, in the machine's memory or on disk, as the decoder says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lf_hf.decoder.decoder import Decoder, check_finite
from lf_hf.families.table import DecoderLayer
from lf_hf.refit.layer_parts import after_half, mid_state

Place = Literal["device", "host", "disk"]
Fetch = Callable[[], Tensor]
States = Sequence[Tensor]
"""Batches of states on their way through the layers, each of shape (sequences B, tokens T, hidden)."""


class StateStore(ExitStack):
    """Makes the lists of states of one computation. Use in a `with` block, in which its lists can be read.

    Parameters
    ----------
    place : {"device", "host", "disk"}
        Where states are kept; "device" is where they are made.
    scratch : Path, optional
        Folder for "disk". Default: that for temporary files.
    """

    def __init__(self, place: Place = "device", scratch: Path | None = None) -> None:
        super().__init__()
        self.place = place
        self._folder = self.enter_context(tempfile.TemporaryDirectory(dir=scratch)) if place == "disk" else None

    def keep(self, states: Iterable[Tensor]) -> Sequence[Tensor]:
        """A list of these states; only one of them need be on its device at a time."""
        if self.place == "device":
            return list(states)
        return _Fetched([self._written(state) for state in states] if self.place == "host" else self._on_disk(states))

    @staticmethod
    def _written(state: Tensor) -> Fetch:
        """Into the machine's memory, locked where a GPU copies from it, so that copies do not hold up the host."""
        kept = torch.empty(state.shape, dtype=state.dtype, pin_memory=torch.cuda.is_available())
        device = state.device
        kept.copy_(state, non_blocking=True)
        return lambda: kept.to(device, non_blocking=True)

    def _on_disk(self, states: Iterable[Tensor]) -> list[Fetch]:
        """Into one file, which is deleted with the list."""
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with the list

        def fetch(start: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
            file.seek(start)
            data = np.fromfile(file, np.uint8, shape.numel() * dtype.itemsize)
            return torch.from_numpy(data).view(dtype).view(shape).to(device)

        fetches: list[Fetch] = []
        for state in states:
            fetches.append(partial(fetch, file.tell(), state.shape, state.dtype, state.device))
            file.write(state.contiguous().view(torch.uint8).cpu().numpy().data)
        file.flush()
        return fetches


class _Fetched(Sequence[Tensor]):
    """States that come back to their device when they are asked for."""

    def __init__(self, fetches: list[Fetch]) -> None:
        self._fetches = fetches

    def __len__(self) -> int:
        return len(self._fetches)

    def __getitem__(self, index: Any) -> Any:
        return self._fetches[index]()


@dataclass(frozen=True)
class Traces:
    """States of sequences on their way through a group's layers; each is (sequences B, tokens T, hidden)."""

    inputs: list[Sequence[Tensor]]  # before each layer
    mid_states: list[Sequence[Tensor]]  # between its attention and its MLP
    output: Sequence[Tensor]

    def attention_targets(self) -> Iterator[Tensor]:
        """The states before the first layer, with all that the attention of any layer of the group added to them."""
        for n, first in enumerate(self.inputs[0]):
            yield first + sum(r[n] - i[n] for r, i in zip(self.mid_states, self.inputs, strict=True))


@torch.no_grad()
def trace(decoder: Decoder, layers: Sequence[DecoderLayer], states: Sequence[Tensor], store: StateStore) -> Traces:
    """Run layers one after the other; all states are kept where the first one's weights are."""
    inputs, mid_states = [on_device(states, layers[0], store)], []
    for layer in layers:
        mid_states.append(store.keep(mid_state(decoder, layer, state) for state in inputs[-1]))
        inputs.append(store.keep(after_half(decoder, decoder.family.mlp, layer, state) for state in mid_states[-1]))
    return Traces(inputs[:-1], mid_states, inputs[-1])


def run_states(decoder: Decoder, layer: DecoderLayer, states: States, store: StateStore) -> States:
    """Run one layer, where its weights are."""
    return store.keep(decoder.run_layer(layer, state) for state in on_device(states, layer, store))


@torch.no_grad()
def run_boundaries(decoder: Decoder, embedded: States, store: StateStore) -> Iterator[States]:
    """States before each layer of the model, and after the last one.

    Raises ValueError if a layer's output contains NaN or inf; the layer is named.
    """
    states = store.keep(embedded)
    yield states
    numbers = range(decoder.num_layers)
    for number, layer in zip(numbers, decoder.layers(numbers), strict=True):
        states = store.keep(decoder.run_layer(layer, state) for state in states)
        check_finite(states, number)
        yield states


def on_device(states: Sequence[Tensor], layer: DecoderLayer, store: StateStore) -> Sequence[Tensor]:
    """The same states where a layer's weights are."""
    device = layer.mlp.down_proj.weight.device
    return states if not states or states[0].device == device else store.keep(state.to(device) for state in states)
