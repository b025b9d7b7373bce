"""The plan of a run on this machine, and the checks that come with it."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import WORK
from lf_hf.healing.result import repeats_note
from lf_hf.healing.text import expected_epochs
from lf_hf.plan.machine import Machine, devices_of
from lf_hf.plan.plan import Plan
from lf_hf.plan.probe import probe
from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import local_processes
from lf_hf.runtime.memory import in_gib
from lf_hf.settings import SHORTEST_LENGTH, FusionConfig, HealSettings
from lf_hf.text.calibration import Corpus

logger = logging.get_logger(__name__)
_LONG = 1  # minutes of a run that are worth a line


def plan_run(
    base: Base,
    config: FusionConfig,
    folder: Path | None,
    *,
    healing: HealSettings | None = None,
    goes_on: bool = False,
    training_args: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan on this machine, with room on the disk of `folder`, which has to be there.

    `healing` are the settings of a healing that follows; the plan has those on this launch. `goes_on`: it was cut short
    in `folder`, and trains what it did. `training_args` are None where a user cannot give any. Raises ValueError if a
    device, training arguments or the memory will not do, and OSError if the disk has too little room.
    """
    target = folder or Path(tempfile.gettempdir())
    otherwise: str | None = None
    dtype, device_map = base.loaded_dtype, base.loading.get("device_map")
    max_memory = base.loading.get("max_memory")
    is_spread = device_map is None and max_memory and local_processes() == 1
    devices = devices_of("auto" if is_spread else device_map)
    machine = Machine.here(devices, max_memory)
    device = torch.device(machine.device) if machine.is_here else devices[0]
    if dtype == torch.bfloat16 and machine.is_here and not (machine.has_card or machine.bfloat16):
        logger.warning("This CPU has no instructions for bfloat16, so it is several times as slow as float32.")
    if healing is not None and device.index and local_processes() == 1:
        kind, number = device.type, device.index
        raise ValueError(f"Healing trains on {kind}:0, not on {kind}:{number}; hide the others, and give {kind}.")
    if healing is not None:
        from lf_hf.healing.heal import prepare  # imports the Trainer, which takes seconds

        longest = base.text_config.max_position_embeddings
        advice = "give method='refit' and heal_tokens=0, and heal the result with lf_hf.heal"
        by_default = explained("Where a fusion heals, it does so by the defaults", advice, ValueError)
        with by_default if training_args is None else nullcontext():
            healing, shards, bfloat16 = prepare(healing, longest, training_args or {}, str(device))
        machine = replace(machine, shards=shards, bfloat16=bfloat16 if machine.is_here else machine.bfloat16)
        if training_args is not None:  # by a command of its own
            shorter = healing.length // 2
            otherwise = f"length={shorter}" if shorter >= SHORTEST_LENGTH else None
        if goes_on:
            otherwise = f"remove {str(target / WORK)!r} to begin anew"
    place = next(place for place in (target, *target.parents) if place.is_dir())
    from lf_hf.inputs.phases import plan_phases  # imports scipy, which opening does not need

    planned = plan_phases(
        base.config,
        dtype,
        config,
        machine,
        healing=healing,
        otherwise=otherwise,
        device_map=device_map if isinstance(device_map, dict) else None,
        rates=partial(probe, device, dtype, base.config) if machine.is_here else None,
    )
    trains = planned.healing and planned.healing.train
    if machine.is_here and trains == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError("train='lora' needs the peft package; run `pip install '.[heal]'` in lf_hf's checkout.")
    if machine.is_here and (folder is not None or trains):
        made = (folder / WORK).rglob("*") if folder is not None else ()
        written = sum(file.stat().st_size for file in made if file.is_file())
        needed, unused = planned.disk - written, shutil.disk_usage(place).free
        if unused < needed:
            raise OSError(
                f"The disk of {str(place)!r} has {in_gib(unused)} free, and the result takes, with what lies there "
                f"meanwhile, {in_gib(needed)}; make room, or give a folder on another disk."
            )
    minutes = planned.minutes
    if minutes and goes_on:  # all else is done
        minutes = {phase: minutes[phase] for phase in ("heal", "judge")}
    return replace(planned, minutes=minutes)


def check_text_to_heal(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: HealSettings, base: Base) -> None:
    """Raise ValueError if there is too little text to heal on, and say if it is repeated often."""
    epochs = expected_epochs(tokenizer, corpus, settings, base.text_config.vocab_size)
    if repeats := repeats_note(epochs):
        logger.warning(repeats)


@contextmanager
def following(plan: Plan) -> Iterator[None]:
    """Say how long a run takes, if that is long, and what to plan with where memory runs out all the same."""
    if plan.minutes and sum(plan.minutes.values()) > _LONG:
        logger.warning(f"Plan: {plan.minutes_line}.")
    try:
        yield
    except torch.OutOfMemoryError:
        device = plan.device
        less = {**plan.machine.free, device: plan.peak[device] * 3 // 4}
        places = ",".join(f"{place}={size >> 20}MiB" for place, size in less.items())
        raise MemoryError(
            f"Memory ran out on {device}, of which the plan took {in_gib(plan.peak[device])}; another process may use "
            f"it. Give max_memory={places}, and the run is planned for less."
        ) from None
