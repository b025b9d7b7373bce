"""The plan of a run on this machine, and the checks that come with it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import SPREAD, Base
from lf_hf.checkpoint.saving import WORK, check_room, existing
from lf_hf.healing.result import repeats_note
from lf_hf.healing.resuming import noted_healing
from lf_hf.healing.text import expected_epochs, given_text
from lf_hf.plan.machine import LaunchOfTraining, Machine
from lf_hf.plan.plan import Plan, plan
from lf_hf.plan.probe import probe
from lf_hf.runtime.launch import compute_once, local_processes, own_device
from lf_hf.runtime.numerics import slow_bfloat16_note
from lf_hf.settings import FusionConfig, HealSettings
from lf_hf.text.calibration import Corpus

logger = logging.get_logger(__name__)
_LONG = 1  # minutes of a run that are worth a line


def training_on_launch(
    settings: HealSettings, base: Base, training_args: Mapping[str, Any]
) -> tuple[HealSettings, LaunchOfTraining]:
    """The settings that a healing has on this launch, and what the launch makes of its weights.

    Raises ValueError for arguments that cannot be used.
    """
    from lf_hf.healing.heal import prepare  # imports the Trainer, which takes seconds

    return prepare(settings, base.text_config.max_position_embeddings, training_args)


def as_begun(settings: HealSettings, folder: Path, made_of: Mapping[str, str]) -> HealSettings:
    """The settings of a healing: where the same one was cut short in a folder, they train what that one trains."""
    note = compute_once(lambda: noted_healing(folder / WORK, made_of))
    return replace(settings, train=note.get("train", settings.train))


def check_text_to_heal(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, settings: HealSettings, base: Base) -> None:
    """Raise ValueError if there is too little text to heal on, and say if it is repeated often."""
    given = given_text(tokenizer, corpus, settings, base.text_config.vocab_size)
    if repeats := repeats_note(expected_epochs(given, corpus, settings)):
        logger.warning(repeats)


def plan_run(
    base: Base,
    config: FusionConfig,
    training: HealSettings | None,
    folder: Path | None,
    *,
    low_memory: bool = False,
    launch: LaunchOfTraining | None = None,
    is_timed: bool = True,
) -> Plan:
    """The plan on this machine, with room on the disk of `folder`, which has to be there."""
    dtype, device_map = base.loaded_dtype, base.loading.get("device_map")
    max_memory = base.loading.get("max_memory")
    devices = _devices("auto" if device_map is None and max_memory else device_map)
    if training is not None and devices[0].index and local_processes() == 1:
        kind, number = devices[0].type, devices[0].index
        raise ValueError(f"Healing trains on {kind}:0, not on {kind}:{number}; hide the others, and give {kind}.")
    place = existing(Path(tempfile.gettempdir()) if folder is None else folder)
    machine = Machine.here(devices, max_memory, place)
    if launch is not None:
        in_bfloat16 = launch.bfloat16 if machine.is_here else machine.bfloat16
        machine = replace(machine, shards=launch.shards, bfloat16=in_bfloat16)
    given = device_map if isinstance(device_map, dict) else None
    rates = partial(probe, devices[0], dtype, base.config) if machine.is_here and is_timed else None
    planned = plan(
        base.config, dtype, config, machine, healing=training, device_map=given, low_memory=low_memory, rates=rates
    )
    trains = planned.healing.train if planned.healing else None
    if machine.is_here and trains == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError("train='lora' needs the peft package; run `pip install '.[heal]'` in lf_hf's checkout.")
    if machine.is_here and (folder is not None or trains):
        written = sum(file.stat().st_size for file in (place / WORK).rglob("*") if file.is_file())
        check_room(place, planned.disk - written, "the fused model takes, with what lies there meanwhile,")
    if note := slow_bfloat16_note(dtype, devices[0]):
        logger.warning(note)
    return planned


def announce(plan: Plan) -> None:
    """Say how long a run takes, if that is long."""
    if plan.minutes and sum(plan.minutes.values()) > _LONG:
        logger.warning(f"Plan: {plan.minutes_line}.")


def _devices(device_map: Any) -> list[torch.device]:
    """Where layers compute, as from_pretrained's `device_map` says; by default on the accelerator, if there is one.

    Apple's has no float64, and is taken only where it is asked for.
    """
    if isinstance(device_map, dict):
        named = [torch.device(device) for device in dict.fromkeys(device_map.values()) if device != "disk"]
        return [device for device in named if device.type != "cpu"] or [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    if device_map is None and accelerator is not None and accelerator.type != "mps":
        device_map = own_device(accelerator.type)
    if device_map in SPREAD and accelerator is not None:
        return [torch.device(accelerator.type, number) for number in range(torch.accelerator.device_count())]
    device = torch.device("cpu" if device_map in (None, *SPREAD) else device_map)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return [device]
