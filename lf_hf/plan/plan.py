"""What a run takes, before weights are read: where they lie, peak bytes by place, and minutes by phase.

Pure arithmetic on a config, settings and a machine, which need not be this one: no weights, text or device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import infer_auto_device_map

from lf_hf.decoder.demand import Need, Setup, Work, times
from lf_hf.families.models import text_model, text_prefix
from lf_hf.families.shape import Shape
from lf_hf.plan.machine import CONTEXT, PYTHON, Machine, place_name
from lf_hf.plan.probe import Rates
from lf_hf.runtime.amounts import CPU_BATCH, LARGEST_BATCH, LONGEST_GROUP, MAX_SHARD_BYTES, least_longest, longest_group
from lf_hf.runtime.memory import in_gib
from lf_hf.settings import FusionConfig, HealSettings

_BATCH_SHARE = 16  # of a card's memory, one part in so many is for a batch
_SECONDS_OF_WORK = 1e11  # operations
_OFFLOADED = 3  # layers that come and go: one that computes, one that is read, and one that is made


Count = Callable[[Setup], Mapping[str, Need]]
"""What phases take by their names, in their order."""


class NoRoom(ValueError):
    """No way to run fits the machine; `needed` bytes, which the message names, would do at a `place`.

    `otherwise` are other settings that would do.
    """

    def __init__(self, what: str, machine: Machine, needed: int, place: str, otherwise: Iterable[str] = ()) -> None:
        free, takes = in_gib(machine.free[place]), in_gib(needed)
        if free == takes:
            free, takes = (f"{size:,} bytes" for size in (machine.free[place], needed))
        advice = ", or ".join(["give a device with so much", *otherwise])
        super().__init__(f"{free} are free on {place}, and {what} takes {takes} there at least; {advice}.")
        self.what, self.needed, self.place = what, needed, place


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
    """

    machine: Machine
    device_map: dict[str, str | int] | None  # for from_pretrained; None: whole on one device
    batch_bytes: int
    resting_place: Literal["device", "host", "disk"]  # of lists of hidden states
    longest: int  # layers that may become one, where groups are chosen by cost
    healing: HealingPlan | None
    parameters: tuple[int, int]
    weights: dict[str, int]
    phases: dict[str, int]
    peak: dict[str, int]
    disk: int
    work: dict[str, Work]
    minutes: dict[str, float] | None

    @property
    def device(self) -> str:
        return self.machine.device

    @property
    def placing(self) -> dict[str, str | int] | str | None:
        """Where the weights go, as from_pretrained's `device_map`. Raises ValueError for another machine."""
        if not self.machine.is_here:
            raise ValueError(
                f"max_memory names {self.device}, which this machine does not have; a dry run plans for other machines."
            )
        return self.device_map or (self.device if self.machine.has_card else None)

    @property
    def uses_disk(self) -> bool:
        """Whether something lies on a disk while layers are used."""
        return self.resting_place == "disk" or "disk" in self.weights

    def lines(self) -> list[str]:
        """All of it, for people."""
        where = ", ".join(f"{in_gib(size)} on {place}" for place, size in self.weights.items() if size)
        states = {"device": f"on {self.device}", "host": "in memory", "disk": "on disk"}[self.resting_place]
        lines = [f"weights: {where}; hidden states {states}"]
        if self.healing is not None:
            lines.append(f"training: {self.healing.why}")
        free = self.machine.free
        peak = ", ".join(
            f"{in_gib(size)}{f' of {in_gib(free[place])}' if place in free else ''} on {place}"
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
    model: Any,
    dtype: torch.dtype,
    fusion: FusionConfig,
    machine: Machine,
    count: Count,
    *,
    training: Callable[[Shape, int], HealingPlan] | None = None,
    device_map: dict[str, str | int] | None = None,
    rates: Callable[[], Rates] | None = None,
) -> Plan:
    """Decide what lies where, from a base on the meta device, the dtype of its weights and what a machine has.

    `count` says what the phases take, and `training` plans the one of a healing that follows, of a model of a shape
    where all else takes so many bytes at least. `device_map` is where a user wants the weights. `rates` measures the
    machine, as `probe` does; it is not asked where the work is done in seconds anyway. Raises NoRoom if nothing that
    the settings allow fits.
    """
    shape, device = Shape.of(model, dtype.itemsize), machine.device
    own, free = machine.own_bytes(shape.vocab), machine.free[device]
    phases = _that_fits(_Phases(Setup(shape, CPU_BATCH, machine.has_card), fusion, count), machine, own)
    steps = training and training(shape, own + phases.least)
    if own + phases.least > free:
        raise NoRoom("a run with all weights elsewhere", machine, own + phases.least, device)
    resting_place = _place_of_states(phases, free - own, machine.free.get("cpu", 0))
    room = own + phases.most(resting_place)
    in_memory = PYTHON + CONTEXT + max(phases.written, phases.lists * (resting_place == "host"))  # beside a card
    if device_map is None and shape.bytes + room > free:
        room = own + max(phases.most(resting_place, away=True) + phases.passing, phases.written)
        device_map = _placed(model, dtype, machine, room, in_memory)
    weights = _weights_by_place(model, dtype, device_map or {"": device}, device)
    phases = phases.with_setup(on_disk="disk" in weights)
    lies_elsewhere = weights.keys() != {device}
    beside = own + weights.get(device, 0)
    taken = {}
    for name, need in phases.needs.items():
        lists = need.lists * (resting_place == "device")
        made = need.here * weights.get(device, 0) // shape.bytes
        taken[name] = beside + need.inside + lists + made + (phases.passing + need.away) * lies_elsewhere
    work = {name: need.work for name, need in phases.needs.items()}
    parameters = shape.total, shape.total - fusion.least_fusions * shape.layer
    made, in_training = parameters[1] * shape.size, 0
    if steps is not None:
        taken["heal"] = steps.bytes
        work |= {"heal": steps.work, "judge": times(work.pop("judge"), 2)}  # before and after
        final_states = shape.hidden * 2 * steps.settings.tokens
        in_training = final_states + steps.disk + made * bool(fusion.heal_tokens)  # and the fused model meanwhile
    if lies_elsewhere and not machine.has_card:
        taken["write"] = beside + phases.written
    peak = {device: max(taken.values())}
    if machine.has_card:
        peak["cpu"] = weights.get("cpu", 0) + in_memory
    for place in peak.keys() & machine.free.keys():
        if peak[place] > machine.free[place]:
            raise NoRoom("a run", machine, peak[place], place)
    disk = made + max(phases.lists * (resting_place == "disk"), in_training) + weights.get("disk", 0)
    if device_map and machine.has_card and not weights.keys() - {"cpu", "disk"}:
        device_map = _with_norm_on(device, model, device_map)
    setup, minutes = phases.setup, _minutes(work, rates)
    return Plan(
        machine=machine,
        device_map=device_map,
        batch_bytes=setup.batch_bytes,
        resting_place=resting_place,
        longest=setup.longest,
        healing=steps,
        parameters=parameters,
        weights=weights,
        phases=taken,
        peak=peak,
        disk=disk,
        work=work,
        minutes=minutes,
    )


@dataclass(frozen=True)
class _Phases:
    """The phases of a fusion, but for training."""

    setup: Setup
    config: FusionConfig
    count: Count

    def with_setup(self, **changes: Any) -> _Phases:
        return replace(self, setup=replace(self.setup, **changes))

    @cached_property
    def needs(self) -> Mapping[str, Need]:
        return self.count(self.setup)

    @property
    def passing(self) -> int:
        """Bytes of layers that come and go, and of embeddings, where weights lie elsewhere."""
        shape = self.setup.shape
        return _OFFLOADED * shape.layer_bytes + shape.head * shape.size

    @property
    def written(self) -> int:
        """Bytes of a file of the result, which are in memory while it is written if they lie elsewhere."""
        shape = self.setup.shape
        return min(shape.bytes, max(MAX_SHARD_BYTES, shape.head * shape.size))

    @property
    def least(self) -> int:
        """What would do beside what is taken before there are weights: with all of them here, or all elsewhere."""
        here = self.most("elsewhere") + self.setup.shape.bytes
        return min(here, max(self.most("elsewhere", here=False, away=True) + self.passing, self.written))

    @property
    def lists(self) -> int:
        """The most bytes of lists of states."""
        return max(need.lists for need in self.needs.values())

    def most(self, resting_place: str, *, here: bool = True, away: bool = False) -> int:
        """The most bytes of a phase, with lists of states where these are on the "device", and weights `here` or
        `away` as in `Need`, or both."""
        return max(
            need.inside + need.here * here + need.away * away + need.lists * (resting_place == "device")
            for need in self.needs.values()
        )


def _minutes(work: Mapping[str, Work], rates: Callable[[], Rates] | None) -> dict[str, float] | None:
    """By phase; None where nothing measures the machine, and it would take longer than seconds."""
    if sum(amount for of in work.values() for amount in of.values()) < _SECONDS_OF_WORK:
        return dict.fromkeys(work, 0.0)
    if rates is None:
        return None
    measured = rates()
    return {name: sum(amount / measured[rate] for rate, amount in of.items()) / 60 for name, of in work.items()}


def _that_fits(phases: _Phases, machine: Machine, own: int) -> _Phases:
    """As many layers that may become one as there is room for, with what else lies elsewhere.

    That is a choice where groups are long or short by their costs, and a user's limit does not change it. Batches are
    small on the CPU, and on a card with little room.
    """
    config, inner = phases.config, phases.setup.shape.inner
    longest = least = config.least_fusions + 1
    if config.selection == "groups":
        longest, least = longest_group(inner, config.least_fusions), least_longest(inner, config.least_fusions)
        if config.within_budget:
            longest = LONGEST_GROUP
    free = machine.free[machine.device]
    phases = phases.with_setup(longest=longest)
    while phases.setup.longest > least and own + phases.least > max(free, machine.unlimited):
        phases = phases.with_setup(longest=phases.setup.longest - 1)
    large = min(max(CPU_BATCH, free // _BATCH_SHARE), LARGEST_BATCH) if machine.has_card else CPU_BATCH
    with_large = phases.with_setup(batch_bytes=large)
    return with_large if own + with_large.least <= free else phases


def _place_of_states(phases: _Phases, free: int, in_memory: int) -> Literal["device", "host", "disk"]:
    """Where lists of states rest: where layers compute, if they fit beside all weights, else as near as they fit.

    `in_memory` are the bytes that are free beside a card, half of which are for layers.
    """
    if phases.most("device") + phases.setup.shape.bytes <= free:
        return "device"
    most = min(in_memory // 2, in_memory - PYTHON - CONTEXT)
    return "host" if phases.setup.on_card and phases.lists <= most else "disk"


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
