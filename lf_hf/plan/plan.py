"""What a run takes, before weights are read: where they lie, peak bytes by place, and minutes by phase.

Pure arithmetic on a config, settings and a machine, which need not be this one: no weights, text or device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
from accelerate import infer_auto_device_map
from transformers import PreTrainedConfig

from lf_hf.families.models import model_class, text_model, text_prefix
from lf_hf.plan.machine import CONTEXT, PYTHON, Machine, place_name
from lf_hf.plan.phases import Phases, Work, healing_bytes, healing_work, times
from lf_hf.plan.probe import Rates
from lf_hf.plan.shape import Shape
from lf_hf.runtime.amounts import CPU_BATCH, LARGEST_BATCH, LONGEST_GROUP
from lf_hf.runtime.memory import in_gib
from lf_hf.settings import FusionConfig, HealSettings

_BATCH_SHARE = 16  # of a card's memory, one part in so many is for a batch
_SECONDS_OF_WORK = 1e11  # operations
_STATE, _OF_ADAPTER = 12, 4  # bytes on disk of a trained parameter: it and two moments, and an adapter's alone
_TRAINED = {"layers": "all layers", "fused": "the fused layers", "lora": "adapters", "all": "all parameters"}


class NoRoom(ValueError):
    """No way to run fits the machine; `needed` bytes, which the message names, would do at a place."""

    def __init__(self, what: str, machine: Machine, needed: int, otherwise: str | None, place: str = "") -> None:
        place = place or machine.device
        free, takes = in_gib(machine.free[place]), in_gib(needed)
        if free == takes:
            free, takes = (f"{size:,} bytes" for size in (machine.free[place], needed))
        advice = "give a device with so much" + f", or {otherwise}" * bool(otherwise)
        super().__init__(f"{free} are free on {place}, and {what} takes {takes} there at least; {advice}.")
        self.needed = needed


@dataclass(frozen=True)
class HealingPlan:
    """What a healing trains and why, how many sequences at a time, and bytes: on its `device`, and of states on disk.

    `settings` are those of the healing, with what it trains.
    """

    settings: HealSettings
    device: str
    gradient_checkpointing: bool
    sequences: int
    why: str
    bytes: int
    disk: int
    work: Work

    @property
    def train(self) -> str:
        """What is trained: a rung of the ladder, or what a user asked for."""
        return str(self.settings.train)


@dataclass(frozen=True)
class Plan:
    """Where everything lies, and what it takes.

    `parameters` are the base's and the result's, `peak` is by place, and `phases` by phase of the place that computes;
    `disk` is at most, while it runs. `work` and `minutes` are by phase, the latter None for a device that is not here.
    `begun` is the note of the same healing, if it was cut short.
    """

    machine: Machine
    device_map: dict[str, str | int] | None  # for from_pretrained; None: whole on one device
    batch_bytes: int
    states: Literal["device", "host", "disk"]
    longest: int  # layers that may become one, where groups are chosen by cost
    healing: HealingPlan | None
    parameters: tuple[int, int]
    weights: dict[str, int]
    phases: dict[str, int]
    peak: dict[str, int]
    disk: int
    work: dict[str, Work]
    minutes: dict[str, float] | None
    begun: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self.machine.device

    @property
    def place(self) -> dict[str, str | int] | str | None:
        """Where the weights go, as from_pretrained's `device_map`. Raises ValueError for another machine."""
        if not self.machine.is_here:
            raise ValueError(
                f"max_memory names {self.device}, which this machine does not have; a dry run plans for other machines."
            )
        return self.device_map or self.one_place

    @property
    def one_place(self) -> str | None:
        """Where a model lies whole, as from_pretrained's `device_map`: where layers compute."""
        return self.device if self.machine.has_card else None

    @property
    def is_spread(self) -> bool:
        """Whether weights lie on several cards."""
        return len(self.weights.keys() - {"cpu", "disk"}) > 1

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
    healing: HealSettings | None = None,
    otherwise: str | None = "method='refit'",
    device_map: dict[str, str | int] | None = None,
    rates: Callable[[], Rates] | None = None,
) -> Plan:
    """Decide what lies where, and what trains, from a base's config, the dtype of its weights and what a machine has.

    `healing` are the settings of the healing that follows; to choose what it trains, `train` is None. `otherwise` is
    what to advise where no healing fits, and `device_map` where a user wants the weights. `rates` measures the machine,
    as `probe` does; it is not asked where the work is done in seconds anyway. Raises NoRoom if nothing that the
    settings allow fits.
    """
    with torch.device("meta"):
        model = model_class(config)(config)
    shape, device = Shape.of(model, dtype.itemsize), machine.device
    heal_tokens = healing.tokens if healing else 0
    own, free = machine.own_bytes(shape.vocab), machine.free[device]
    phases = _that_fits(Phases(shape, fusion, CPU_BATCH, machine.has_card, heal_tokens), free, free - own)
    steps = None if healing is None else _plan_healing(phases, machine, healing, otherwise)
    if own + phases.least > free:
        cheaper = None if fusion.method == "truncate" else "method='truncate'"
        raise NoRoom("a run with all weights elsewhere", machine, own + phases.least, cheaper)
    states = _place_of_states(phases, free - own, machine.free.get("cpu", 0))
    room = own + phases.most(states)
    in_memory = PYTHON + CONTEXT + max(phases.written, phases.lists * (states == "host"))  # beside a card
    if device_map is None and shape.bytes + room > free:
        room = max(room + phases.passing, own + phases.written)
        device_map = _placed(model, dtype, machine, room, in_memory)
    weights = _weights_by_place(model, dtype, device_map or {"": device}, device)
    phases = replace(phases, on_disk="disk" in weights)
    lies_elsewhere = weights.keys() != {device}
    beside = own + weights.get(device, 0)
    taken = {
        name: beside + phases.passing * lies_elsewhere + need.inside + need.lists * (states == "device")
        for name, need in phases.needs.items()
    }
    if steps is not None:
        taken["heal"] = steps.bytes
    if lies_elsewhere and not machine.has_card:
        taken["write"] = beside + phases.written
    peak = {device: max(taken.values())}
    if machine.has_card:
        peak["cpu"] = weights.get("cpu", 0) + in_memory
    for place in peak.keys() & machine.free.keys():
        if peak[place] > machine.free[place]:
            raise NoRoom("a run", machine, peak[place], None, place)
    parameters = shape.total, shape.total - phases.fusions * shape.layer
    made = parameters[1] * shape.size
    training = shape.hidden * 2 * heal_tokens + steps.disk if steps else 0  # the base's final states, and the Trainer's
    kept = made * bool(fusion.heal_tokens)  # the fused model, until the healed one is whole
    disk = made + max(phases.lists * (states == "disk"), training + kept) + weights.get("disk", 0)
    if device_map and machine.has_card and not weights.keys() - {"cpu", "disk"}:
        device_map = _with_norm_on(device, model, device_map)
    work = {name: need.work for name, need in phases.needs.items()}
    if steps is not None:
        work |= {"heal": steps.work, "judge": times(work.pop("judge"), 2)}  # before and after
    longest, minutes = phases.longest, _minutes(work, rates)
    return Plan(
        machine,
        device_map,
        phases.batch_bytes,
        states,
        longest,
        steps,
        parameters,
        weights,
        taken,
        peak,
        disk,
        work,
        minutes,
    )


def _minutes(work: Mapping[str, Work], rates: Callable[[], Rates] | None) -> dict[str, float] | None:
    """By phase; None where nothing measures the machine, and it would take longer than seconds."""
    if sum(amount for of in work.values() for amount in of.values()) < _SECONDS_OF_WORK:
        return dict.fromkeys(work, 0.0)
    if rates is None:
        return None
    measured = rates()
    return {name: sum(amount / measured[rate] for rate, amount in of.items()) / 60 for name, of in work.items()}


def _that_fits(phases: Phases, free: int, room: int) -> Phases:
    """As many layers that may become one as have room, with what else lies elsewhere, where long groups are a choice.

    Batches are small on the CPU, and on a card with little room.
    """
    longest = least = phases.fusions + 1
    if phases.config.selection == "groups":
        longest = LONGEST_GROUP if phases.config.within_budget else min(longest, LONGEST_GROUP)
        least = 2
    small = large = phases.batch_bytes
    if phases.on_card:
        large = min(max(small, free // _BATCH_SHARE), LARGEST_BATCH)
    tried = [replace(phases, longest=number, batch_bytes=large) for number in range(longest, least - 1, -1)]
    least_of_all = replace(phases, longest=least, batch_bytes=small)
    return next((phases for phases in tried if phases.least <= room), least_of_all)


def _place_of_states(phases: Phases, free: int, in_memory: int) -> Literal["device", "host", "disk"]:
    """Where lists of states rest: where layers compute, if they fit beside all weights, else as near as they fit.

    `in_memory` are the bytes that are free beside a card, half of which are for layers.
    """
    if phases.most("device") + phases.shape.bytes <= free:
        return "device"
    most = min(in_memory // 2, in_memory - PYTHON - CONTEXT)
    return "host" if phases.on_card and phases.lists <= most else "disk"


def _placed(model: Any, dtype: torch.dtype, machine: Machine, room: int, in_memory: int) -> dict[str, str | int]:
    """Where accelerate puts layers, if `room` stays free where they compute, and beside a card so much `in_memory`."""
    most: dict[str | int, int] = {}
    for place, size in machine.free.items():
        index = torch.device(place).index
        kept = in_memory if place == "cpu" != machine.device else room
        most[place if index is None else index] = max(0, size - kept)
    if not machine.is_here:  # accelerate warns of devices that it does not find
        logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    layer = type(text_model(model).layers[0]).__name__
    return dict(infer_auto_device_map(model, most, no_split_module_classes=[layer], dtype=dtype))


def _with_norm_on(device: str, model: Any, device_map: Mapping[str, str | int]) -> dict[str, str | int]:
    """The same places, but the final norm's weights on a card: accelerate computes where it has put something."""
    norm, placed = f"{text_prefix(model)}norm", dict(device_map)
    parts = norm.split(".")
    for depth in range(len(parts)):
        parent = ".".join(parts[:depth])
        if parent in placed:
            place = placed.pop(parent)
            for child, _ in model.get_submodule(parent).named_children():
                placed[f"{parent}.{child}".removeprefix(".")] = place
    return placed | {norm: device}


def _weights_by_place(
    model: Any, dtype: torch.dtype, device_map: Mapping[str, str | int], device: str
) -> dict[str, int]:
    """Bytes of parameters, tied ones once, by the place that a device map gives them: a number is a card."""
    weights: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        modules = [key for key in device_map if not key or f"{name}.".startswith(f"{key}.")]
        if not modules:
            raise ValueError(f"device_map says nothing of {name}; give a place for it, or for '', which is all else.")
        place = device_map[max(modules, key=len)]
        weights[place_name(place, torch.device(device).type)] += parameter.numel() * dtype.itemsize
    return dict(weights)


def _plan_healing(phases: Phases, machine: Machine, healing: HealSettings, otherwise: str | None) -> HealingPlan:
    """What trains: the first rung of a ladder that fits, with as many sequences at a time as fit.

    All layers, the fused ones, or adapters, each without and with checkpoints of gradients. The fused model stays where
    it trains, and what is not trained is its own. Raises NoRoom, with the advice `otherwise`, where no rung fits: it
    names what both the fusion and the healing need.
    """
    shape, layers = phases.shape, phases.shape.layers - phases.fusions
    own, free = machine.own_bytes(shape.vocab), machine.free[machine.device]
    fused = phases.fusions * shape.layer  # parameters, as many as go
    trained_by = {
        "layers": layers * shape.layer,
        "fused": fused,
        "lora": layers * shape.adapters * healing.lora_rank,
        "all": shape.total - fused,
    }
    ladder = [healing.train] if healing.train else ["layers", "fused", "lora"]
    batch = max(1, healing.batch_tokens // healing.length // machine.processes)
    divisors = [number for number in range(batch, 0, -1) if batch % number == 0]
    least: dict[str, int] = {}  # of what did not fit
    for train, checkpoints, sequences in product(ladder, (False, True), divisors):
        trained = trained_by[train]
        tokens = sequences * healing.length
        takes = own + healing_bytes(shape, machine, layers, trained, tokens, checkpoints=checkpoints)
        if takes > free:
            least[train] = takes
            continue
        why = f"{_TRAINED[train]}, {trained:,} parameters{' with gradient checkpointing' * checkpoints}"
        if train != ladder[0]:
            why += f", as {_TRAINED[ladder[0]]} would take {in_gib(least[ladder[0]])}"
        work = healing_work(shape, layers, trained, healing, checkpoints=checkpoints)
        last = _OF_ADAPTER if train == "lora" else shape.size  # in the model's own dtype
        disk = (_STATE + (_STATE if machine.shards > 1 else last)) * trained
        settings = replace(healing, train=train)
        return HealingPlan(settings, machine.device, checkpoints, sequences, why, takes, disk, work)
    what = f"healing with train={ladder[-1]!r} and gradient checkpointing"
    raise NoRoom(what, machine, max(least[ladder[-1]], own + phases.least), otherwise)
