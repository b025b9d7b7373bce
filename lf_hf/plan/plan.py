"""What a run takes, before weights are read: where they lie, peak bytes by place, and minutes by phase.

Pure arithmetic on a config, settings and a machine, which need not be this one: no weights, text or device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import infer_auto_device_map
from transformers import PreTrainedConfig

from lf_hf.families.models import family_of, model_class
from lf_hf.plan.healing import HealingPlan, Training, plan_healing
from lf_hf.plan.machine import CONTEXT, PYTHON, Machine, NoRoom
from lf_hf.plan.phases import Phases, Shape, fused_layers, times
from lf_hf.plan.probe import Rates
from lf_hf.runtime.memory import in_gib
from lf_hf.settings import LONGEST_GROUP, FusionConfig

CPU_BATCH, LARGEST_BATCH = 1 << 26, 1 << 32
"""Bytes that a batch may take inside a layer: on the CPU, where more gains nothing, and on a large card."""
_BATCH_SHARE = 16  # of another card, one part in so many
_SECONDS_OF_WORK = 1e11  # operations
_LOW_MEMORY_STATES = 1 << 27  # bytes of states in memory where little is to be used


@dataclass(frozen=True)
class Plan:
    """Where everything lies, and what it takes.

    `peak` is by place, and `phases` by phase of the place that computes; `disk` is at most, while it runs. `minutes`
    are by phase, None for a device that is not here.
    """

    machine: Machine
    device_map: dict[str, str | int] | None  # for from_pretrained; None: whole on one device
    batch_bytes: int
    states: Literal["device", "host", "disk"]
    longest: int  # layers that may become one, where groups are chosen by cost
    healing: HealingPlan | None
    weights: dict[str, int]
    phases: dict[str, int]
    peak: dict[str, int]
    disk: int
    minutes: dict[str, float] | None

    @property
    def device(self) -> str:
        return self.machine.device

    @property
    def uses_disk(self) -> bool:
        """Whether something lies on a disk while layers are used."""
        return self.states == "disk" or "disk" in self.weights

    def lines(self) -> list[str]:
        """All of it, for people."""
        where = ", ".join(f"{in_gib(size)} on {place}" for place, size in self.weights.items() if size)
        states = {"device": f"on {self.device}", "host": "in memory", "disk": "on disk"}[self.states]
        lines = [f"weights: {where}; hidden states {states}"]
        if self.healing is not None:
            lines.append(f"training: {self.healing.why}")
        peak = ", ".join(
            f"{in_gib(size)} of {in_gib(self.machine.free.get(place, 0))} on {place}"
            for place, size in self.peak.items()
        )
        lines += [f"peak memory, about: {peak}", f"disk, while it runs, at most about: {in_gib(self.disk)}"]
        return [*lines, self.minutes_line]

    @property
    def minutes_line(self) -> str:
        """How long it takes, for people."""
        if self.minutes is None:
            return "minutes unknown: that device is not here"
        of_phases = ", ".join(f"{name} {minutes:.1f}" for name, minutes in self.minutes.items())
        return f"minutes, about: {of_phases}; in all {sum(self.minutes.values()):.1f}"


def plan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    fusion: FusionConfig,
    machine: Machine,
    *,
    healing: Training | None = None,
    device_map: dict[str, str | int] | None = None,
    low_memory: bool = False,
    rates: Callable[[], Rates] | None = None,
) -> Plan:
    """Decide what lies where, and what trains, from a base's config and what a machine has.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the base.
    dtype : torch.dtype
        Of its weights.
    fusion : FusionConfig
    machine : Machine
    healing : Training, optional
        Settings of the healing that follows.
    device_map : dict, optional
        Where a user wants the weights.
    low_memory : bool
        All weights on the disk, and few states in memory.
    rates : callable, optional
        What measures the rates of the machine, as `probe` does; not asked where the work is done in seconds anyway.

    Raises
    ------
    NoRoom
        If nothing that the settings allow fits.
    """
    with torch.device("meta"):
        model = model_class(config)(config)
    shape, device = Shape.of(model, dtype.itemsize), machine.device
    batch_bytes = CPU_BATCH
    if machine.has_card:
        batch_bytes = min(max(CPU_BATCH, machine.free[device] // _BATCH_SHARE), LARGEST_BATCH)
    heal_tokens = healing.tokens if healing else 0
    phases_of = partial(Phases, shape, fusion, batch_bytes, machine.has_card, heal_tokens)
    own, free = machine.own_bytes(shape.vocab), machine.free[device]
    longest, phases = _longest_that_fits(phases_of, fusion, free - own)
    states = _place_of_states(phases, machine, free - own, low_memory=low_memory)
    room = own + phases.most(states)
    if low_memory:
        device_map = {"": "disk"}
    elif device_map is None and shape.bytes + room > free:
        in_memory = phases.lists * (states == "host")
        device_map = _placed(model, dtype, machine, room + phases.passing, in_memory)
    weights = _weights_by_place(model, dtype, device_map or {"": device}, device)
    phases = phases_of(longest, on_disk="disk" in weights)
    passing = phases.passing * (weights.keys() != {device})
    beside = own + weights.get(device, 0) + passing
    by_phase = {name: beside + need.inside + need.lists * (states == "device") for name, need in phases.needs.items()}
    steps = None
    if healing is not None:
        steps = plan_healing(shape, fusion, machine, healing)
        by_phase["heal"] = steps.bytes
    peak = {device: max(by_phase.values())}
    if machine.has_card:
        peak["cpu"] = PYTHON + CONTEXT + weights.get("cpu", 0) + phases.lists * (states == "host")
    made = (shape.total - fused_layers(fusion) * shape.layer) * shape.size
    training = shape.hidden * 2 * heal_tokens + steps.disk if steps else 0  # the base's final states, and the Trainer's
    kept = made * bool(fusion.heal_tokens)  # the fused model, until the healed one is whole
    disk = made + max(phases.lists * (states == "disk"), training + kept) + weights.get("disk", 0)
    work = {name: need.work for name, need in phases.needs.items()}
    if steps is not None:
        work |= {"heal": steps.work, "judge": times(work.pop("judge"), 2)}
    minutes = None
    if sum(amount for of in work.values() for amount in of.values()) < _SECONDS_OF_WORK:
        minutes = dict.fromkeys(work, 0.0)
    elif rates is not None:
        measured = rates()
        minutes = {name: sum(amount / measured[rate] for rate, amount in of.items()) / 60 for name, of in work.items()}
    return Plan(machine, device_map, batch_bytes, states, longest, steps, weights, by_phase, peak, disk, minutes)


def _longest_that_fits(phases_of: Callable[..., Phases], fusion: FusionConfig, free: int) -> tuple[int, Phases]:
    """How many layers may become one, where long groups are a choice: as many as fit, with what else lies elsewhere."""
    longest = fused_layers(fusion) + 1
    if fusion.selection == "groups":
        longest = LONGEST_GROUP if fusion.within_budget else min(longest, LONGEST_GROUP)
    phases = phases_of(longest, on_disk=False)
    least = 2 if fusion.selection == "groups" else longest
    while longest > least and phases.most("elsewhere") + min(phases.passing, phases.shape.bytes) > free:
        longest -= 1
        phases = phases_of(longest, on_disk=False)
    return longest, phases


def _place_of_states(
    phases: Phases, machine: Machine, free: int, *, low_memory: bool
) -> Literal["device", "host", "disk"]:
    """Where lists of states rest: where layers compute, if they fit beside all weights, else as near as they fit."""
    if low_memory and not machine.has_card:
        return "device" if phases.lists <= _LOW_MEMORY_STATES else "disk"
    if phases.most("device") + (phases.passing if low_memory else phases.shape.bytes) <= free:
        return "device"
    if machine.has_card and phases.lists <= machine.free.get("cpu", 0) // 2:  # the rest is for layers
        return "host"
    return "disk"


def _placed(model: Any, dtype: torch.dtype, machine: Machine, room: int, in_memory: int) -> dict[str, str | int]:
    """Where accelerate puts layers, if `room` stays free where they compute, and beside a card so much `in_memory`.

    Raises NoRoom if there is no such room.
    """
    device = machine.device
    if room > machine.free[device]:
        raise NoRoom("fusing, with all weights elsewhere,", machine, room, "fewer calibration_tokens")
    most: dict[str | int, int] = {}
    for place, size in machine.free.items():
        if place != "disk":
            index = torch.device(place).index
            kept = PYTHON + CONTEXT + in_memory if place == "cpu" != device else room
            most[place if index is None else index] = max(0, size - kept)
    if not machine.is_here:  # accelerate warns of devices that it does not find
        logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    layer = family_of(model.config).decoder_layer.__name__
    return dict(infer_auto_device_map(model, most, no_split_module_classes=[layer], dtype=dtype))


def _weights_by_place(
    model: Any, dtype: torch.dtype, device_map: Mapping[str, str | int], device: str
) -> dict[str, int]:
    """Bytes of parameters, tied ones once, by the place that a device map gives them: a number is a card."""
    weights: Counter[str] = Counter()
    kind = torch.device(device).type
    for name, parameter in model.named_parameters():
        module = max((key for key in device_map if not key or f"{name}.".startswith(f"{key}.")), key=len)
        place = device_map[module]
        weights[f"{kind}:{place}" if isinstance(place, int) else str(place)] += parameter.numel() * dtype.itemsize
    return dict(weights)
