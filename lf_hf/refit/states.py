"""Lists of hidden states of calibration text: on their device, in the machine's memory or on disk, as there is room."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from lf_hf.decoder.interface import Decoder
from lf_hf.runtime.memory import free_memory

SHARE = 2  # Lists may take half of what is free: fits need the rest.
Place = Literal["device", "host", "disk"]


class StateStore:
    """Makes the lists of states of one computation. Use in a `with` block, in which its lists can be read.

    Parameters
    ----------
    place : {"device", "host", "disk"}
        Where states are kept; "device" is where they are made.
    """

    def __init__(self, place: Place = "device") -> None:
        self.place = place
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) if place == "disk" else None

    @classmethod
    def with_room(cls, decoder: Decoder, expected_bytes: int) -> StateStore:
        """A store for lists that hold `expected_bytes` together at a time, where these fit."""
        on_device = decoder.device.type != "cpu"
        if on_device and expected_bytes < free_memory(decoder.device) // SHARE:
            return cls("device")
        room = free_memory(torch.device("cpu")) // SHARE
        if expected_bytes < (room if decoder.states_in_memory is None else decoder.states_in_memory):
            return cls("host" if on_device else "device")
        return cls("disk")

    def __enter__(self) -> StateStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def keep(self, states: Iterable[Tensor] = ()) -> Sequence[Tensor]:
        """A list of these states; only one of them need be on its device at a time."""
        if self.place == "device":
            return list(states)
        if self.place == "host":
            return _OnHost(states)
        assert self._folder is not None
        return _OnDisk(states, self._folder)


class _Elsewhere(Sequence[Tensor]):
    """States that come back to their device when they are asked for."""

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        numbers = range(len(self))[index]
        return self._fetch(numbers) if isinstance(numbers, int) else [self._fetch(number) for number in numbers]

    @abstractmethod
    def _fetch(self, index: int) -> Tensor:
        """One of them, where it was made."""


class _OnHost(_Elsewhere):
    """In the machine's memory, locked where a GPU copies from it, so that copies do not hold up the host."""

    def __init__(self, states: Iterable[Tensor]) -> None:
        self._kept: list[tuple[Tensor, torch.device]] = []
        for state in states:
            kept = torch.empty(state.shape, dtype=state.dtype, pin_memory=torch.cuda.is_available())
            self._kept.append((kept.copy_(state, non_blocking=True), state.device))

    def __len__(self) -> int:
        return len(self._kept)

    def _fetch(self, index: int) -> Tensor:
        kept, device = self._kept[index]
        return kept.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Stored:
    start: int  # byte in the file
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _OnDisk(_Elsewhere):
    """In one file, which is deleted with the list."""

    def __init__(self, states: Iterable[Tensor], folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the list
        self._stored: list[_Stored] = []
        end = 0
        for state in states:
            data = state.contiguous().view(torch.uint8).cpu().numpy()
            self._file.write(data.data)
            self._stored.append(_Stored(end, state.shape, state.dtype, state.device))
            end += data.nbytes
        self._file.flush()

    def __len__(self) -> int:
        return len(self._stored)

    def _fetch(self, index: int) -> Tensor:
        stored = self._stored[index]
        self._file.seek(stored.start)
        data = np.fromfile(self._file, np.uint8, stored.shape.numel() * stored.dtype.itemsize)
        return torch.from_numpy(data).view(stored.dtype).view(stored.shape).to(stored.device)
