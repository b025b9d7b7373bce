"""The plan of a fusion, and of the healing that may follow it, from what each room says that its phase takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig

from lf_hf.choose.choice import choosing, num_groups
from lf_hf.decoder.demand import Need, Setup, Work
from lf_hf.healing.ladder import plan_training
from lf_hf.healing.teacher import teaching
from lf_hf.measure.dense import measuring
from lf_hf.measure.judge import judging
from lf_hf.plan.machine import Machine
from lf_hf.plan.plan import Plan, plan
from lf_hf.plan.probe import Rates
from lf_hf.refit.bottom_up import making
from lf_hf.settings import FusionConfig, HealSettings
from lf_hf.stages.averaging import averaging


def plan_phases(
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
    """`plan` of a fusion of a model with this config, and of a healing with these settings, if there are any.

    To choose what it trains, `healing.train` is None; `otherwise` is what to advise where no healing fits.
    """
    training = None if healing is None else partial(plan_training, machine, fusion.least_fusions, healing, otherwise)
    phases = partial(_phases, fusion, healing)
    return plan(config, dtype, fusion, machine, phases, training=training, device_map=device_map, rates=rates)


def _phases(fusion: FusionConfig, healing: HealSettings | None, setup: Setup) -> dict[str, Need]:
    """What the phases take, in their order, but for the training."""
    phases = {"measure": measuring(setup, fusion)}
    if fusion.needs_text:
        phases["choose"] = choosing(setup, fusion)
    phases["make"] = Need(fusion.least_fusions * setup.shape.layer_bytes, 0, Work())
    if fusion.fits:
        phases["make"] = making(setup, fusion, num_groups(fusion))
    if fusion.averages:
        phases["make"] = averaging(setup, fusion)
    phases["judge"] = judging(setup, fusion.perplexity_tokens, fusion.least_fusions)
    if healing is not None:
        phases["teach"] = teaching(setup, healing)
    return phases
