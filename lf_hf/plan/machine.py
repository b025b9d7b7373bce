"""A machine, this one or another: how much is free at each place, and what is taken before there is a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from lf_hf.runtime.launch import SPREAD, local_processes, num_processes, own_device
from lf_hf.runtime.memory import free_memory
from lf_hf.runtime.numerics import accelerator, computes_bfloat16

PYTHON, _OF_TOKENIZER = 13 << 26, 512  # bytes that Python takes with all libraries, and a token of the vocabulary
CONTEXT = 1 << 30
"""Bytes of a card for its kernels and the workspaces of its libraries."""


@dataclass(frozen=True)
class Machine:
    """What a run may use: bytes by place, and what computes, which is the first place.

    Places are "cuda:0" and the like, and "cpu". `bfloat16`: whether training computes in it. `is_here`: whether it is
    this machine, whose rates can be measured. `unlimited` are the bytes that are free where layers compute, if a user
    wants fewer to be used: with as many the same groups of layers are chosen.
    """

    free: Mapping[str, int]
    bfloat16: bool
    is_here: bool = True
    unlimited: int = 0
    processes: int = 1  # that share a step of a training
    shards: int = 1  # of these, how many share the weights of what trains

    @property
    def device(self) -> str:
        return next(iter(self.free))

    @property
    def has_card(self) -> bool:
        return self.device != "cpu"

    def own_bytes(self, vocab: int) -> int:
        """Bytes that are taken before there are weights, where layers compute."""
        return CONTEXT if self.has_card else PYTHON + _OF_TOKENIZER * vocab

    @classmethod
    def here(
        cls, devices: Sequence[torch.device], max_memory: str | Mapping[int | str, int | str] | None = None
    ) -> Machine:
        """What is free now on some devices and in memory; with `max_memory` no more than that.

        A place that `max_memory` does not name is not used, but for the disk. Raises ValueError for one that cannot be
        read. Where it names a device that is not here, the machine is another one, and all that it names is free.
        The first process of a launch plans for all; where each has a card of its own, and another is named, that stands
        for it.
        """
        given = {} if max_memory is None else read_max_memory(max_memory)
        own, *others = map(str, devices)
        if local_processes() > 1 and own != "cpu" and not others:
            cards = {place: size for place, size in given.items() if place not in ("cpu", "disk")}
            given = {place: size for place, size in given.items() if place not in cards}
            if cards:
                given[own] = cards.get(own, min(cards.values()))
        free = {str(device): free_memory(device) for device in [*devices, torch.device("cpu")]}
        is_here = given.keys() <= free.keys() | {"disk"}
        named = given or free
        if is_here:
            named = {place: min(size, free.get(place, size)) for place, size in named.items()}
        in_order = sorted(named.keys() - {"disk"}, key=lambda place: (place == "cpu", place))  # cards first
        bfloat16 = computes_bfloat16(torch.device(in_order[0])) if is_here else in_order[0] != "cpu"
        unlimited = free.get(in_order[0], 0)
        return cls({place: named[place] for place in in_order}, bfloat16, is_here, unlimited, num_processes())


def read_max_memory(given: str | Mapping[int | str, Any]) -> dict[str, int]:
    """Bytes by place, of "cuda:0=20GiB,cpu=30GiB" or of accelerate's dictionary, in which a number is a card.

    Raises ValueError for what cannot be read, and for a place that is named twice.
    """
    card = accelerator() or torch.device("cuda")
    try:
        named: list[Any] = (
            [part.strip().split("=") for part in given.split(",")] if isinstance(given, str) else [*given.items()]
        )
        sizes = {place_name(key, card.type): _bytes(size) for key, size in named}
    except (AttributeError, RuntimeError, ValueError, TypeError, OverflowError):
        raise ValueError(
            f"max_memory must be places and sizes, such as cuda:0=20GiB,cpu=30GiB; got {given!r:.80}."
        ) from None
    if len(sizes) < len(named):
        raise ValueError(f"max_memory names a place twice: {given!r:.80}.")
    if sizes.keys() == {"disk"}:
        raise ValueError("max_memory names the disk alone; give what a card or the memory may hold, too.")
    return sizes


def _bytes(size: Any) -> int:
    """Of "20GiB", or of a number of any type."""
    return int(convert_file_size_to_int(size if isinstance(size, str) else int(size)))


def place_name(place: int | str, kind: str) -> str:
    """A place as accelerate names it, as "cuda:0", "cpu" or "disk"; a number is a card of a `kind`."""
    if place in ("cpu", "disk"):
        return str(place)
    device = torch.device(f"{kind}:{place}" if isinstance(place, int) else place)
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def devices_of(device_map: Any) -> list[torch.device]:
    """Where layers compute, as from_pretrained's `device_map` says; by default on the accelerator, if there is one.

    Apple's has no float64, and is taken only where it is asked for.
    """
    if isinstance(device_map, dict):
        named = [torch.device(device) for device in dict.fromkeys(device_map.values()) if device != "disk"]
        return [device for device in named if device.type != "cpu"] or [torch.device("cpu")]
    kind = accelerator()
    if device_map is None and kind is not None and kind.type != "mps":
        device_map = own_device(kind.type)
    if device_map in SPREAD and kind is not None:
        return [torch.device(kind.type, number) for number in range(torch.accelerator.device_count())]
    device = torch.device("cpu" if device_map in (None, *SPREAD) else device_map)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return [device]
