"""Lists of hidden states of calibration text: on their device, in the machine's memory or on disk, as there is room."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.runtime.memory import free_memory

SHARE = 1 / 2  # of what is free: lists may take it, fits need the rest
Place = Literal["device", "host", "disk"]
Fetch = Callable[[], Tensor]


class StateStore(ExitStack):
    """Makes the lists of states of one computation. Use in a `with` block, in which its lists can be read.

    Parameters
    ----------
    place : {"device", "host", "disk"}
        Where states are kept; "device" is where they are made.
    """

    def __init__(self, place: Place = "device") -> None:
        super().__init__()
        self.place = place
        self._folder = self.enter_context(tempfile.TemporaryDirectory()) if place == "disk" else None

    @classmethod
    def with_room(cls, decoder: Decoder, expected_bytes: int) -> StateStore:
        """A store for lists that hold `expected_bytes` together at a time, where these fit."""
        on_device = decoder.device.type != "cpu"
        if on_device and expected_bytes < free_memory(decoder.device) * SHARE:
            return cls("device")
        room = int(free_memory(torch.device("cpu")) * SHARE)
        if expected_bytes < (room if decoder.states_in_memory is None else decoder.states_in_memory):
            return cls("host" if on_device else "device")
        return cls("disk")

    def keep(self, states: Iterable[Tensor] = ()) -> Sequence[Tensor]:
        """A list of these states; only one of them need be on its device at a time."""
        if self.place == "device":
            return list(states)
        return _Fetched([self._written(state) for state in states] if self.place == "host" else self._on_disk(states))

    @staticmethod
    def _written(state: Tensor) -> Fetch:
        """Into the machine's memory, locked where a GPU copies from it, so that copies do not hold up the host."""
        kept, device = torch.empty(state.shape, dtype=state.dtype, pin_memory=torch.cuda.is_available()), state.device
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
