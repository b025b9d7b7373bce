"""A fit keeps a device busy: how often the host waits for it does not grow with the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama
from torch.utils._pytree import tree_leaves
from two_devices import CPU, OTHER, TwoDevices

from lf_hf import FusionConfig
from lf_hf.decoder.in_memory import ModelDecoder
from lf_hf.measure import Measurements
from lf_hf.pipeline import fuse_pairs
from lf_hf.refit.last_pass import fit_from_bottom
from lf_hf.steps import start

WAITING = {"item", "tolist", "nonzero", "__bool__", "__float__", "__int__", "__index__"}


class Counting(TwoDevices):
    """Counts how often the host waits for a number or a tensor of the device, and how many copies go there."""

    waits = sent = 0

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super()._run(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], torch.Tensor):
            source = self.place(args[0])
            places = {self.place(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
            self.waits += source == OTHER and (name in WAITING or (name in ("to", "cpu") and places == {CPU}))
            self.sent += source == CPU and name == "to" and places == {OTHER} and args[0].dim() > 0
        return result


def waits_and_copies(num_sequences: int, selection: str) -> tuple[int, int]:
    model = make_llama(num_hidden_layers=5)
    devices = Counting()
    with torch.no_grad(), devices:
        for tensor in (*model.parameters(), *model.buffers()):
            devices.put(tensor, OTHER)
        decoder = ModelDecoder(model, keep_originals=True)
        text = [torch.randint(0, 320, (16,)) for _ in range(num_sequences)]
        config = FusionConfig(num_fusions=1, method="refit", selection=selection)
        measured = Measurements(settings={}, judged=[], seconds={}, text=text)
        devices.waits = devices.sent = 0
        with start(decoder, config, measured) as fusion:
            fuse_pairs(fusion, 1)
        fit_from_bottom(decoder, fusion.groups, text, config)
        return devices.waits, devices.sent


@pytest.mark.parametrize("selection", ["least_influence", "groups"])
def test_waiting_does_not_grow_with_the_text(selection: str) -> None:
    few, many = (waits_and_copies(count, selection) for count in (8, 64))
    assert few == many and few[0] > 0
