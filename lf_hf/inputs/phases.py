"""The plan of a fusion, and of the healing that may follow it, from what each room says that its phase takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from lf_hf.choose.choice import choosing
from lf_hf.choose.methods import MAKING
from lf_hf.decoder.demand import Need, Setup
from lf_hf.families.models import model_class
from lf_hf.healing.ladder import plan_training
from lf_hf.healing.teacher import teaching
from lf_hf.measure.dense import measuring
from lf_hf.measure.judge import judging
from lf_hf.plan.machine import Machine
from lf_hf.plan.plan import NoRoom, Plan, plan
from lf_hf.plan.probe import Rates
from lf_hf.runtime.numerics import computes_bfloat16
from lf_hf.settings import FusionConfig, HealSettings


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
    try:
        return _plan(model, dtype, fusion, machine, healing, device_map=device_map, rates=rates)
    except NoRoom as refused:
        ways = [otherwise] if otherwise else []
        if not otherwise and (healing is None or fusion.heal_tokens != 0):
            ways = _what_would_do(model, dtype, fusion, machine, healing)
        raise NoRoom(refused.what, machine, refused.needed, refused.place, ways) from None


def _plan(
    model: Any, dtype: torch.dtype, fusion: FusionConfig, machine: Machine, healing: HealSettings | None, **given: Any
) -> Plan:
    training = None if healing is None else partial(plan_training, machine, fusion.least_fusions, healing)
    return plan(model, dtype, fusion, machine, partial(_phases, fusion, healing), training=training, **given)


def _what_would_do(
    model: Any, dtype: torch.dtype, fusion: FusionConfig, machine: Machine, healing: HealSettings | None
) -> list[str]:
    """Settings with which a fusion fits, asked of the plan: without healing, on the CPU, or the most fusions."""

    def fits(fusion: FusionConfig, machine: Machine, healing: HealSettings | None) -> bool:
        with suppress(NoRoom):
            return bool(_plan(model, dtype, fusion, machine, healing))
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
    phases["judge"] = judging(setup, fusion.perplexity_tokens, fusion.least_fusions)
    if healing is not None:
        phases["teach"] = teaching(setup, healing)
    return phases
