"""Hidden states of calibration text at every layer boundary of a model that is being fused."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lf_hf.decoder import Decoder
from lf_hf.stages.selection import influence

_MEMORY_LIMIT = 1 << 30  # bytes of states that stay in memory; more go to a temporary folder


class Boundaries:
    """States before each layer and after the last, kept up to date while layers are fused.

    Updating after a fusion runs the layers from the fused one upwards, once. Use in a `with` block.

    Attributes
    ----------
    influences : list of float
        For each layer, how much it changes the residual stream.
    """

    def __init__(self, decoder: Decoder, sequences: Sequence[Tensor]) -> None:
        self.influences: list[float] = []
        self._decoder = decoder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._states: dict[int, list[Tensor]] = {}
        states = decoder.embed(sequences)
        total = sum(state.nbytes for state in states) * (decoder.num_layers + 1)
        if total > _MEMORY_LIMIT:
            self._folder = tempfile.TemporaryDirectory()
        self._keep(0, states)
        self.update(0)

    def __enter__(self) -> Boundaries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def before(self, index: int) -> list[Tensor]:
        """The input states of layer `index`, or, for the number of layers, the last layer's output."""
        if self._folder is None:
            return self._states[index]
        loaded = load_file(self._file(index))
        return [loaded[str(n)] for n in range(len(loaded))]

    @torch.no_grad()
    def update(self, index: int) -> None:
        """Take note that layers from `index` on have changed."""
        del self.influences[index:]
        states = self.before(index)
        for position in range(index, self._decoder.num_layers):
            with self._decoder.layer(position) as layer:
                after = [self._decoder.run_layer(layer, state) for state in states]
            self.influences.append(influence(states, after))
            self._keep(position + 1, after)
            states = after

    def _keep(self, index: int, states: list[Tensor]) -> None:
        if self._folder is None:
            self._states[index] = states
        else:
            save_file({str(n): state.contiguous() for n, state in enumerate(states)}, self._file(index))

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name, f"{index}.safetensors")
