"""The plan of a run on a machine, from what each room says that its phase takes, and the checks that come with it."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from lf_hf.checkpoint.base import Base
from lf_hf.checkpoint.saving import TEACHER, WORK
from lf_hf.choose.choice import choosing
from lf_hf.choose.methods import MAKING
from lf_hf.decoder.decoder import Decoder
from lf_hf.decoder.demand import Need, Setup
from lf_hf.families.models import model_class
from lf_hf.healing.ladder import plan_training
from lf_hf.healing.teacher import teaching, trained_by
from lf_hf.healing.text import expected_epochs, repeats_note
from lf_hf.measure.dense import measuring
from lf_hf.measure.judge import judging
from lf_hf.pipeline.fusion import FusionInputs
from lf_hf.pipeline.healing import HealInputs
from lf_hf.plan.machine import Machine, devices_of
from lf_hf.plan.plan import NoRoom, Plan, plan
from lf_hf.plan.probe import Rates, probe
from lf_hf.runtime.errors import explained
from lf_hf.runtime.launch import local_processes
from lf_hf.runtime.memory import in_gib
from lf_hf.runtime.numerics import computes_bfloat16
from lf_hf.settings import SHORTEST_LENGTH, FusionConfig, HealSettings
from lf_hf.text.calibration import Corpus
from lf_hf.text.packing import check_enough

logger = logging.get_logger(__name__)
_LONG = 1  # minutes of a run that are worth a line


def fusion_plan(inputs: FusionInputs, folder: Path | None = None) -> Plan:
    """The plan of a fusion, and of the healing that follows.

    Raises ValueError, before weights are read, if there is too little text or memory, and OSError if the disk of
    `folder`, where the result goes, has too little room for it and for what lies there meanwhile.
    """
    base, config = inputs.base, inputs.config
    if inputs.texts.text is not None:
        length = min(config.calibration_length, base.text_config.max_position_embeddings)
        check_enough(inputs.tokenizer, inputs.texts.text, length, base.text_config.vocab_size)
    text = (inputs.tokenizer, inputs.texts.to_heal) if inputs.texts.to_heal else None
    return plan_run(base, config, folder, healing=config.healing, text=text)


def healing_plan(inputs: HealInputs, out: Path | None) -> Plan:
    """The plan of a healing, which goes on where one was cut short in the folder of its result.

    Raises ValueError, before weights are read, if there is too little text or memory, and OSError if the disk of `out`,
    where the result goes, has too little room for it and for the states of the training.
    """
    fewer = inputs.report.layers_before - inputs.report.layers_after
    config = FusionConfig(fewer, "truncate", perplexity_tokens=inputs.judging_tokens)
    trained = out and trained_by(out / WORK / TEACHER)
    return plan_run(
        inputs.base,
        config,
        out,
        healing=replace(inputs.settings, train=trained) if trained else inputs.settings,
        text=(inputs.tokenizer, inputs.corpus),
        goes_on=trained is not None,
        training_args=inputs.training_args,
    )


def plan_run(
    base: Base,
    config: FusionConfig,
    folder: Path | None,
    *,
    healing: HealSettings | None = None,
    text: tuple[PreTrainedTokenizerBase, Corpus] | None = None,
    goes_on: bool = False,
    training_args: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan on this machine, with room on the disk of `folder`, which has to be there.

    `healing` are the settings of a healing that follows on a `text`; the plan has those on this launch. `goes_on`: it
    was cut short in `folder`, and trains what it did. `training_args` are None where a user cannot give any. Raises
    ValueError if a device, training arguments, the text or the memory will not do, and OSError if the disk has too
    little room.
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
    if healing is not None and text is not None:
        if device.index and local_processes() == 1:
            kind, number = device.type, device.index
            raise ValueError(f"Healing trains on {kind}:0, not on {kind}:{number}; hide the others, and give {kind}.")
        from lf_hf.healing.heal import prepare  # imports the Trainer, which takes seconds

        longest = base.text_config.max_position_embeddings
        advice = "give method='refit' and heal_tokens=0, and heal the result with lf_hf.heal"
        by_default = explained("Where a fusion heals, it does so by the defaults", advice, ValueError)
        with by_default if training_args is None else nullcontext():
            healing, shards, bfloat16 = prepare(healing, longest, training_args or {}, str(device))
        machine = replace(machine, shards=shards, bfloat16=bfloat16 if machine.is_here else machine.bfloat16)
        if repeats := repeats_note(expected_epochs(*text, healing, base.text_config.vocab_size)):
            logger.warning(repeats)
        if training_args is not None:  # by a command of its own
            shorter = healing.length // 2
            otherwise = f"length={shorter}" if shorter >= SHORTEST_LENGTH else None
        if goes_on:
            otherwise = f"remove {str(target / WORK)!r} to begin anew"
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
        place = next(place for place in (target, *target.parents) if place.is_dir())
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


def plan_phases(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    fusion: FusionConfig,
    machine: Machine,
    *,
    healing: HealSettings | None = None,
    otherwise: str | None = None,
    device_map: dict[str, str | int] | None = None,
    rates: Callable[[], Rates] | None = None,
) -> Plan:
    """`plan` of a fusion of a model with this config, and of a healing with these settings, if there are any.

    To choose what it trains, `healing.train` is None. Where it does not fit, NoRoom advises `otherwise` for a healing,
    and for a fusion what the plan says would do.
    """
    with torch.device("meta"):
        model = model_class(config)(config)

    def planned(fusion: FusionConfig, machine: Machine, healing: HealSettings | None, **given: Any) -> Plan:
        training = None if healing is None else partial(plan_training, machine, fusion.least_fusions, healing)
        return plan(model, dtype, fusion, machine, partial(_phases, fusion, healing), training=training, **given)

    try:
        return planned(fusion, machine, healing, device_map=device_map, rates=rates)
    except NoRoom as refused:
        ways = [otherwise] if otherwise else []
        if not otherwise and (healing is None or fusion.heal_tokens != 0):
            ways = _what_would_do(planned, fusion, machine, healing)
        raise NoRoom(refused.what, machine, refused.needed, refused.place, ways) from None


def _what_would_do(
    planned: Callable[..., Plan], fusion: FusionConfig, machine: Machine, healing: HealSettings | None
) -> list[str]:
    """Settings with which a fusion can be `planned`: without healing, on the CPU, or the most fusions."""

    def fits(fusion: FusionConfig, machine: Machine, healing: HealSettings | None) -> bool:
        with suppress(NoRoom):
            return bool(planned(fusion, machine, healing))
        return False

    ways = []
    if healing is not None and fits(fusion, machine, None):
        ways.append("method='refit'")
    if machine.has_card and "cpu" in machine.free:
        size = machine.free["cpu"] >> 20
        bfloat16 = machine.is_here and computes_bfloat16(torch.device("cpu"))
        if fits(fusion, Machine({"cpu": size << 20}, bfloat16, machine.is_here), healing):
            ways.append(f"max_memory=cpu={size}MiB")
    fewer = (replace(fusion, num_fusions=count) for count in range(fusion.least_fusions - 1, 0, -1))
    most = next((config for config in fewer if fits(config, machine, healing)), None)
    return [*ways, f"num_fusions={most.num_fusions}"] if most else ways


def _phases(fusion: FusionConfig, healing: HealSettings | None, setup: Setup) -> dict[str, Need]:
    """What the phases take, in their order, but for the training."""
    phases = {"measure": measuring(setup, fusion)}
    if fusion.needs_text:
        phases["choose"] = choosing(setup, fusion)
    phases["make"] = MAKING[fusion.method].count(setup, fusion)
    phases["judge"] = judging(setup, fusion.perplexity_tokens, fusion.least_fusions, models=2)
    if healing is not None:
        phases["teach"] = teaching(setup, healing)
    return phases


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


def open_decoder(base: Base, plan: Plan, scratch: Path | None = None) -> Decoder:
    """A base by a plan, layer by layer; `scratch` is a folder for what the plan puts on a disk.

    Without one that is in a folder for temporary files, which goes with the model.
    """
    placing: dict[str, Any] = {"device_map": plan.placing, "max_memory": None}
    folder = None
    if plan.uses_disk:
        folder = scratch or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        placing["offload_folder"] = base.loading.get("offload_folder", str(folder))
    decoder = Decoder(base.load(**placing))
    if folder is not None and scratch is None:
        weakref.finalize(decoder.model, shutil.rmtree, folder, ignore_errors=True)
    decoder.batch_bytes = plan.batch_bytes
    decoder.resting_place = plan.resting_place
    decoder.scratch = folder
    decoder.longest_group = plan.longest
    return decoder
