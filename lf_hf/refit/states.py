"""Lists of hidden states of calibration text, in memory while they are small and on disk when they are large."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

from safetensors.torch import load_file, save_file
from torch import Tensor

MEMORY_LIMIT = 1 << 27  # bytes that one store keeps in memory


class StateStore:
    """Makes the lists of states of one computation. Use in a `with` block, in which its lists can be read.

    Parameters
    ----------
    expected_bytes : int
        How much the lists that exist at a time will hold together; above 128 MiB they lie in a temporary folder.
    """

    def __init__(self, expected_bytes: int) -> None:
        self._folder = tempfile.TemporaryDirectory() if expected_bytes > MEMORY_LIMIT else None

    def __enter__(self) -> StateStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def keep(self, states: Iterable[Tensor] = ()) -> States:
        """A list of these states; only one of them need be in memory at a time."""
        kept = States(None if self._folder is None else self._folder.name)
        for state in states:
            kept.append(state)
        return kept


class States(Sequence[Tensor]):
    """A list of tensors. What of it lies on disk is deleted with it."""

    def __init__(self, folder: str | None) -> None:
        self._tensors: list[Tensor] = []
        self._devices: list[str] = []  # of tensors on disk
        self._folder: Path | None = None
        if folder is not None:
            self._folder = Path(tempfile.mkdtemp(dir=folder))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def append(self, state: Tensor) -> None:
        if self._folder is None:
            self._tensors.append(state)
        else:
            save_file({"state": state.contiguous()}, self._file(len(self)))
            self._devices.append(str(state.device))

    def __len__(self) -> int:
        return len(self._tensors) + len(self._devices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if self._folder is None:
            return self._tensors[index]
        index = range(len(self))[index]
        return load_file(self._file(index), device=self._devices[index])["state"]

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index}.safetensors"
