"""Layers that lie on disk, for a device that has memory of its own: read ahead, changed and copied."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from conftest import make_llama
from safetensors.torch import load_file
from torch import Tensor
from two_devices import OTHER, TwoDevices

from lf_hf.checkpoint.base import Base
from lf_hf.decoder.decoder import Decoder

UP = "mlp.up_proj.weight"


@pytest.fixture
def devices() -> Iterator[TwoDevices]:
    with TwoDevices() as entered:
        yield entered


@pytest.fixture
def make_decoder(tmp_path: Path) -> Callable[..., Decoder]:
    def make(**overrides: Any) -> Decoder:
        folder, scratch = tmp_path / "base", tmp_path / "scratch"
        make_llama(**overrides).save_pretrained(folder)
        scratch.mkdir()
        device_map = {"model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "disk", "model.norm": OTHER}
        base = Base.open(folder, {})
        loading = {**base.loading, "device_map": device_map, "offload_folder": str(scratch)}
        decoder = Decoder(replace(base, loading=loading).load())
        decoder.scratch = scratch
        return decoder

    return make


class Reads:
    """Numbers of the layers that were read; `wait_for` one that another thread reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        self._new = threading.Condition()
        read = OffloadedWeightsLoader.__getitem__

        def noted(loader: OffloadedWeightsLoader, name: str) -> Tensor:
            if name.endswith(UP):
                with self._new:
                    self.layers.append(int(name.split(".")[2]))
                    self._new.notify_all()
            return read(loader, name)

        monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noted)

    def wait_for(self, number: int) -> bool:
        with self._new:
            return self._new.wait_for(lambda: number in self.layers, timeout=30)


def test_the_next_layer_is_read_while_one_is_used(
    devices: TwoDevices, make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, reads = make_decoder(), Reads(monkeypatch)
    for number, layer in enumerate(decoder.layers(range(5))):
        assert layer.mlp.up_proj.weight.device == OTHER
        assert number == 4 or reads.wait_for(number + 1)
    assert reads.layers == [0, 1, 2, 3, 4]


def test_what_is_read_is_what_the_files_hold(
    devices: TwoDevices, make_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    decoder = make_decoder(dtype=torch.bfloat16, attention_bias=True)
    held = load_file(tmp_path / "base" / "model.safetensors")
    for number, layer in enumerate(decoder.layers(range(5))):
        parameters = dict(layer.named_parameters())
        assert len(parameters) == 13
        for name, parameter in parameters.items():
            assert torch.equal(parameter.cpu(), held[f"model.layers.{number}.{name}"])


def test_changes_reach_the_layers_and_no_copies(
    devices: TwoDevices, make_decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    decoder = make_decoder()
    dense = decoder.copy()
    first, third = (layer.mlp.up_proj.weight.cpu() for layer in dense.layers([1, 3]))
    ones, dense_layers = torch.ones_like(third), dense.layers([0, 1])
    next(dense_layers)
    decoder.replace(1, {UP: ones})
    copies = [decoder.copy(), decoder.copy().copy()]
    for number, model in enumerate([*copies, decoder]):
        model.replace(1, {UP: (2 + number) * ones})
        model.remove(2)
    assert torch.equal(next(dense_layers).mlp.up_proj.weight.cpu(), first)
    for number, model in enumerate([*copies, decoder]):
        read = [layer.mlp.up_proj.weight.cpu() for layer in model.layers(range(4))]
        assert torch.equal(read[1], (2 + number) * ones) and torch.equal(read[2], third)
    del copies, model
    gc.collect()
    assert len(list((tmp_path / "scratch").iterdir())) == 1  # a layer's files go with the last model that has it


def test_stopped_streams_leave_no_thread(devices: TwoDevices, make_decoder: Callable[..., Decoder]) -> None:
    before = threading.enumerate()
    decoder = make_decoder()
    for _ in decoder.layers(range(5)):
        break
    layers = decoder.copy().layers(range(5))
    next(layers)
    del layers
    decoder.layer(0)
    assert threading.enumerate() == before
